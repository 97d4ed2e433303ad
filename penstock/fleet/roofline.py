"""How long a step takes at least, and how much longer it takes in practice.

    step = max(bytes read / (bandwidth x memory efficiency), FLOP / (rate x compute efficiency))
           + all-reduces of tensor parallelism + what a step costs whatever it does

The efficiencies and the two constants are fitted to published measurements, and so is the error bar
(backtest.py, docs/planning.md). Williams, Waterman, Patterson: Roofline (2009), for the form.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

from .facts import ModelFacts, Scheme
from .hardware import Device


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What devices reach of their data sheets."""

    memory: float
    """Share of the bandwidth, in decode."""
    compute: float
    """Share of the FLOP/s, in prefill."""
    step: float
    """Seconds that a step takes beside."""
    all_reduce: float
    """Seconds until the ranks have met, for each of the two all-reduces of a layer."""


@dataclass(frozen=True)
class Machine:
    """One replica of a model: devices, tensor parallel, formats."""

    facts: ModelFacts
    device: Device
    tp: int
    scheme: Scheme
    width: int
    """Bytes of what is not quantised."""
    kv_width: int
    """Bytes of an element of the KV cache."""
    efficiency: Efficiency
    expanded: bool = False
    """Whether weights of 8 bits are expanded and multiplied at 16, as our engine's int8 is on GPUs."""

    @functools.cached_property
    def _reads(self) -> tuple[tuple[float, int], ...]:
        """(share of the copies that a token uses, bytes of one rank) of what a step reads."""
        sizes: dict[float, int] = {}
        for weight in self.facts.weights:
            if weight.multiplied:
                size = self.facts.bytes_of(weight, self.scheme, self.tp, self.width)
                sizes[weight.used] = sizes.get(weight.used, 0) + size
        return tuple(sizes.items())

    def read(self, tokens: float) -> float:
        """Bytes of weights that a step of so many tokens reads on one rank: of experts, those that some token
        chose. With independent choices of k among n experts, nobody chose one with (1 - k/n)^tokens."""
        return sum(size if used >= 1 else size * (1 - (1 - used) ** tokens) for used, size in self._reads)

    @functools.cached_property
    def _flops(self) -> float:
        """FLOP of a token, without attention."""
        return 2.0 * self.facts.active_parameters

    @functools.cached_property
    def rate(self) -> float:
        """FLOP/s of all ranks for this scheme. Weights of 4 bits are expanded and multiplied at 16."""
        kind = {"int8": "int8", "fp8": "fp8", "fp8-block": "fp8", "nvfp4": "fp4"}.get(self.scheme.name)
        if self.device.vendor == "cpu" and self.width == 4:
            kind = "fp32"
        if kind == "int8" and self.expanded:
            kind = None
        rate = self.device.flops.get(kind, self.device.rate) if kind else self.device.rate
        return rate * self.tp

    def prefill(self, tokens: int, sequences: int = 1) -> float:
        """Seconds to compute so many prompts of that length, one after the other or together."""
        facts = self.facts
        flops = self._flops * tokens + tokens * facts.attention_flops(tokens / 2)
        seconds = flops * sequences / (self.rate * self.efficiency.compute)
        least = self.read(tokens * sequences) / (self.device.bandwidth * self.efficiency.memory)
        return max(seconds, least) + self._together(tokens * sequences) + self.efficiency.step

    def decode(self, sequences: float, context: float) -> float:
        """Seconds of a step that computes one token of each sequence, behind so many tokens of context."""
        facts = self.facts
        read = self.read(sequences) + sequences * facts.sequence_bytes(int(context), self.kv_width, self.tp)
        flops = sequences * (self._flops + facts.attention_flops(context))
        seconds = max(
            read / (self.device.bandwidth * self.efficiency.memory),
            flops / (self.rate * self.efficiency.compute),
        )
        return seconds + self._together(sequences) + self.efficiency.step

    def _together(self, tokens: float) -> float:
        """Seconds of the all-reduces: two in a layer, each of the hidden states of all tokens.

        A ring moves 2 (n - 1) / n of them over each rank's link, one way.
        """
        if self.tp == 1:
            return 0.0
        link = (self.device.interconnect or _PCIE) / 2
        moved = 2 * (self.tp - 1) / self.tp * tokens * self.facts.hidden_size * 2
        return 2 * self.facts.num_layers * (self.efficiency.all_reduce + moved / link)

    def round(self, sequences: float, prompt: int, output: int) -> float:
        """Seconds until so many sequences, all under way together, have had their prompts and answers.

        Continuous batching interleaves prompts with answers; the work, and so the sum, is the same.
        """
        whole = self.prefill(prompt) - self.efficiency.step if prompt else 0.0
        return sequences * whole + output * self.decode(sequences, prompt + output / 2)

    def throughput(self, sequences: float, prompt: int, output: int) -> float:
        """Output tokens a second, at that concurrency."""
        return sequences * output / self.round(sequences, prompt, output)

    def tpot(self, sequences: float, prompt: int, output: int) -> float:
        """Seconds for each output token, with the others' prompts between."""
        return self.round(sequences, prompt, output) / output


_PCIE = 64e9
"""Bytes/s both ways of 16 lanes of PCIe 4, for devices without NVLink."""


@functools.cache
def fitted() -> Fit:
    """The efficiencies in use, and what they leave unexplained."""
    text = resources.files("penstock.fleet.catalogue").joinpath("efficiency.json").read_text(encoding="utf-8")
    return Fit(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Fit:
    """Result of the back-test: made by `python -m penstock.fleet.backtest`."""

    memory: float
    compute: float
    step: float
    all_reduce: float
    low: float
    """measured / predicted of the tenth percentile, of measurements that the fit has not seen."""
    high: float
    """The same, ninetieth percentile."""
    median_error: float
    """Of the same: |measured / predicted - 1|, median."""
    count: int
    """Measurements."""

    @property
    def efficiency(self) -> Efficiency:
        return Efficiency(self.memory, self.compute, self.step, self.all_reduce)
