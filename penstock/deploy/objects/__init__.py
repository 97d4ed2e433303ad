"""Kubernetes' objects as types: what is misspelt does not come into being, and nothing is pasted together.

base        Object, Metadata, Part: what all have, and plain data
pod         pods: containers, probes, volumes, affinity, security
kinds       objects that have pods, and those around them
yaml        plain data as text
"""

from .base import Metadata, Object, Part, to_plain
from .yaml import dump, dump_all

__all__ = ["Metadata", "Object", "Part", "dump", "dump_all", "to_plain"]
