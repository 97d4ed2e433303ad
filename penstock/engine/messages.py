"""What travels between the API process and the engine process: msgpack over ZeroMQ, plain data only.

    API ── Add · Abort · Settled ──▶ engine
    API ◀── Ready · Output ── engine

    starter ── Join · Leave · Drain ──▶ engine
    starter ◀── Ready · Failed · Output · Lost ── engine

The starter is the process that has started the engine. Where it is the only API process, it is both of these;
else each API process has sockets of its own (engine.clients).

Times are CLOCK_MONOTONIC seconds, which all processes of one machine share.
"""

from __future__ import annotations

import msgspec

from penstock.core.plan import Event
from penstock.core.pooling import PoolingInfo
from penstock.core.request_spec import RequestSpec
from penstock.core.stats import EngineStats


class Add(msgspec.Struct, tag=True, frozen=True):
    """A new request, with all of its sequences."""

    spec: RequestSpec

    @property
    def sequences(self) -> int:
        """How many it is about."""
        return len(self.spec.prompts) * self.spec.n


class Abort(msgspec.Struct, tag=True, frozen=True):
    """End these sequences now; each answers with a last Event (finish `abort`) with its final figures."""

    ids: tuple[str, ...]

    @property
    def sequences(self) -> int:
        """How many it is about."""
        return len(self.ids)


class Settled(msgspec.Struct, tag=True, frozen=True):
    """The figures of the last events of these sequences are counted."""

    ids: tuple[str, ...]


class Join(msgspec.Struct, tag=True, frozen=True):
    """An API process talks to the engine from now on; it binds these addresses."""

    client: int
    """Never that of an earlier one."""
    inbox: str
    outbox: str


class Leave(msgspec.Struct, tag=True, frozen=True):
    """An API process is gone: its sequences end, and their last events go to the starter, as Lost."""

    client: int


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
    max_num_batched_tokens: int = 0
    quantization: str = "none"
    block_bytes: int = 0
    """Keys and values of one block of the KV cache, in all layers."""
    pooling: PoolingInfo | None = None
    """Of a model that pools; it generates nothing."""
    logits_processors: tuple[str, ...] = ()
    """The user's own, by name."""


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


class Output(msgspec.Struct, tag=True, frozen=True):
    """Events of one step (or of aborts between steps), and how things stand after it."""

    events: list[Event]
    stats: EngineStats | None = None


class LostSequence(msgspec.Struct, frozen=True):
    """A sequence whose client has gone before it had counted the figures."""

    last: Event
    """Its last event, without tokens."""
    prompt_tokens: int
    generation_tokens: int
    max_tokens: int
    arrived_at: float


class Lost(msgspec.Struct, tag=True, frozen=True):
    """Somebody else has to count these."""

    sequences: list[LostSequence]


ToEngine = Add | Abort | Settled | Join | Leave | Drain
FromEngine = Ready | Failed | Output | Lost

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
