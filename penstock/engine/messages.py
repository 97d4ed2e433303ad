"""What travels between the API process and the engine process: msgpack over ZeroMQ, plain data only.

    API ── Add · Abort · Drain ──▶ engine
    API ◀── Ready · Failed · Output ── engine

Times are CLOCK_MONOTONIC seconds, which both processes of one machine share.
"""

from __future__ import annotations

import msgspec

from penstock.core.plan import Event
from penstock.core.sampling_params import SamplingParams


class Add(msgspec.Struct, tag=True, frozen=True):
    """A new request."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    """Most tokens to generate, already cut to the context length."""
    arrived_at: float
    priority: int = 0
    cache_salt: str = ""
    leader: str | None = None


class Abort(msgspec.Struct, tag=True, frozen=True):
    """End these requests now; each answers with a last Event (finish `abort`) with its final figures."""

    ids: tuple[str, ...]


class Drain(msgspec.Struct, tag=True, frozen=True):
    """Finish what is there within `timeout` seconds, abort the rest, then exit."""

    timeout: float


class ModelInfo(msgspec.Struct, frozen=True):
    """What the API process must know of the model that the engine has loaded."""

    path: str
    """Local directory."""
    architecture: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    eos_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    max_num_seqs: int
    parameters: int
    startup_seconds: dict[str, float] = {}
    """Seconds of each part of the start, in order."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine serves."""

    info: ModelInfo


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine is going down, and this is why."""

    error_type: str
    """Class name in core.errors."""
    message: str
    advice: str = ""
    param: str | None = None
    trace: str = ""
    """Python traceback, for the log; empty for errors that say it all."""


class StepStats(msgspec.Struct, frozen=True):
    """State after a step, and what the step did; the source of the metrics."""

    step: int
    running: int
    waiting: int
    kv_usage: float
    """Share of blocks that are referenced, 0 to 1."""
    prompt_tokens: int = 0
    """Prompt tokens computed in this step."""
    generation_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens of requests admitted in this step that came from the prefix cache."""
    recomputed_tokens: int = 0
    """Tokens computed again after a preemption."""
    prefix_queries: int = 0
    """Tokens looked up in the prefix index in this step."""
    prefix_hits: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    """Device time of the step."""
    predicted: float = 0.0
    """What the cost model had predicted, in seconds."""
    busy: float = 0.0
    """Device seconds since the start in which steps ran."""
    idle: float = 0.0
    """Device seconds since the start in which none ran."""
    at: float = 0.0
    """When these figures were taken."""
    deferred: int = 0
    """Of `waiting`: not held up by capacity, but until something else is done (siblings, until their leader
    has computed the prompt)."""


class Output(msgspec.Struct, tag=True, frozen=True):
    """Events of one step (or of aborts between steps)."""

    events: list[Event]
    stats: StepStats | None = None


ToEngine = Add | Abort | Drain
FromEngine = Ready | Failed | Output

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
