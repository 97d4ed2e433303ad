"""What all parts of the document are made of: their base, and the kinds of values that have names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$")]
"""What something is called; also what clients write as `model`."""
Share = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
"""A weight, relative to those beside it."""
Count = Annotated[int, Field(ge=0, le=10**15)]
"""Of requests or tokens, in what databases and Redis count exactly."""
Hours = Annotated[float, Field(ge=0, le=2_500_000, allow_inf_nan=False)]
"""Of devices, in nanoseconds of 64 bits."""
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Name of an environment variable. Secrets are never in the file."""
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")]
"""Of HTTP."""
HeaderValue = Annotated[str, Field(pattern=r"^[\x20-\x7e]*$")]
"""Of HTTP; plain ASCII."""
ServiceClass = Literal["realtime", "background"]
"""Who waits for an answer: somebody, or nobody."""
Flag = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
"""Name of a flag, without its dashes."""
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
"""What Kubernetes calls things (RFC 1123)."""
LabelKey = Annotated[
    str,
    Field(pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"),
]
"""Of a label or taint of Kubernetes: `nvidia.com/gpu.product`."""
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$")]
"""Of a label or taint of Kubernetes."""
Image = Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9._:/@-]*$", max_length=512)]
"""A container image, with its tag or digest."""


class Part(BaseModel):
    """Base of all parts: unknown keys are refused, nothing changes. The text beneath a field describes it
    (`penstock.spec.schema.descriptions`)."""

    # validators are made when the first document is read, once for the whole tree and not for each class:
    # commands that read no spec do not pay for them, and the others a third of it
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
