"""Where a model's tensors come from: a checkpoint's safetensors files, or seeded random numbers.

An architecture's constructor asks for its tensors by name and shape, layer by layer; each is read, converted
and packed at once. So there is no second description of the model, no initialisation to skip, and at no time
does more than one tensor exist twice. A tensor asked for and not there, or there and not asked for, is an
error.
"""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock, local
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from penstock.core.errors import ModelLoadError
from penstock.files import shown
from penstock.kernels.operations import Operations
from penstock.kernels.quantization import FP8, restore_fp8

from .checkpoint import find_safetensors
from .layers import Embedding, LayerNorm, Linear, RMSNorm
from .model_config import ModelConfig, StoredFp8
from .staging import Staging
from .stored_fp8 import SCALES, UNUSED

#: Tensors of old checkpoints that are computed, not learnt.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$|embeddings\.position_ids$")
#: What stands before the names of a model's own tensors where it has, or had, a head; or does not.
_PREFIXES = ("model.", "bert.", "roberta.")
#: Heads that are not asked for: the vocabulary's of models that pool, BERT's for its training.
_HEADS = re.compile(r"^(?:lm_head|embed_out|cls|pooler|(?:bert|roberta)\.pooler)\.")
#: The number of a layer in the name of its tensors, in all architectures.
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h)\.(\d{1,6})\.")
#: What opening a file or reading a tensor raises where a file lies about itself.
_BROKEN = (SafetensorError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Threads that read for a GPU: one reads 1 to 3 GB/s of the page cache, and the link takes 12 to 50.
_GPU_READERS = 4

_Layer = TypeVar("_Layer")

#: Reorders the rows of a fused weight or bias, [out, …] → [out, …].
RowOrder = Callable[[torch.Tensor], torch.Tensor]


class Weights(ABC):
    """Tensors by name, converted to the dtype and the device of a table of operations.

    Attributes:
        parameters: elements handed out so far.
        nbytes: bytes that they take on the device, copies included.
    """

    def __init__(self, operations: Operations, scheme: str | None = None) -> None:
        """operations: what the parts of the model will compute with.

        scheme: how to quantise the weights of linear layers; see penstock.kernels.quantization.
        """
        self.operations = operations
        self.dtype = operations.dtype
        self.device = operations.device
        self.scheme = scheme
        # an output layer loses more by four bits, or by rounded activations, than they save
        self._head_scheme = None if scheme is None else "int8"
        self.parameters = 0
        self.nbytes = 0
        self.headless = False
        """The model pools: it has no output layer, and hidden states are what is wanted."""
        self._lock = Lock()
        self._local = local()

    @abstractmethod
    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor as stored; it may be a view of the file. Called from several threads."""

    def _take(
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], *, view: bool = False
    ) -> torch.Tensor:
        """Tensors converted and stacked along their first dimension; with `view` maybe in borrowed memory."""
        stored = [self._read(name, shape) for name, shape in zip(names, shapes, strict=True)]
        parts = [self._sent(tensor).to(self.device, self.dtype) for tensor in stored]
        if len(parts) > 1:
            tensor = torch.cat(parts, out=self._scratch(parts) if view else None)
        else:
            tensor = parts[0] if view or parts[0] is not stored[0] else parts[0].clone()
        with self._lock:
            self.parameters += tensor.numel()
            self.nbytes += tensor.nbytes
        return tensor

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; on a CPU it is there, and so is what was restored on a GPU."""
        if tensor.device.type == self.device.type:
            return tensor
        staging: Staging | None = getattr(self._local, "staging", None)
        if staging is None:
            staging = self._local.staging = Staging(self.device)
        return staging.send(tensor)

    def _scratch(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Memory of this thread for all parts, until its next use: fresh pages cost more than the copy."""
        needed = sum(part.numel() for part in parts)
        buffer: torch.Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.numel() < needed:
            buffer = self._local.buffer = torch.empty(needed, dtype=self.dtype, device=self.device)
        return buffer[:needed].view(-1, *parts[0].shape[1:])

    def layers(self, count: int, build: Callable[[int], _Layer]) -> list[_Layer]:
        """[build(0), …, build(count - 1)], on several threads: reading and packing are single-threaded."""
        if self.device.type == "cpu":
            workers = min(8, count, torch.get_num_threads())
        else:  # packing is the GPU's, and its compilers' first calls are not for several threads
            workers = min(_GPU_READERS, count) if self.scheme is None else 1
        with ThreadPoolExecutor(workers) as pool:  # inference mode is per thread
            return list(pool.map(torch.inference_mode()(build), range(count)))

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """One tensor, in memory of its own."""
        return self._take([name], [shape])

    def exact(self, name: str, *shape: int) -> torch.Tensor:
        """One tensor in float32, as what stands behind the last layer of a model that pools is computed."""
        tensor = self._read(name, shape).to(self.device, torch.float32, copy=True)
        with self._lock:
            self.parameters += tensor.numel()
            self.nbytes += tensor.nbytes
        return tensor

    def rows(self, name: str, shape: tuple[int, int], chosen: Sequence[int]) -> torch.Tensor:
        """Some rows of a table, in float32. Raises ModelLoadError for rows that it does not have."""
        if outside := [row for row in chosen if not 0 <= row < shape[0]]:
            raise ModelLoadError(f"tensor {name!r} of {shape[0]} rows has no row {outside[0]}.")
        rows = self._read(name, shape)[list(chosen)].to(self.device, torch.float32)
        with self._lock:
            self.nbytes += rows.nbytes
        return rows

    def linear(
        self,
        names: str | Sequence[str],
        in_features: int,
        out_features: int | Sequence[int],
        bias: bool = False,
        order: RowOrder | None = None,
        *,
        scheme: str | None = None,
    ) -> Linear:
        """One or several linear layers over the same input as one matrix product.

        Args:
            names: modules (without ".weight"), in the order of the product's columns.
            out_features: of each module.
            order: applied to the rows afterwards.
            scheme: of quantisation, if not that of all.
        """
        scheme = scheme or self.scheme
        names = [names] if isinstance(names, str) else names
        outs = [out_features] if isinstance(out_features, int) else out_features
        weight = self._take(
            [f"{name}.weight" for name in names],
            [(out, in_features) for out in outs],
            # copied anyway, in another order
            view=order is not None or scheme is not None or self.operations.copies_weights,
        )
        vector = self._take([f"{name}.bias" for name in names], [(out,) for out in outs]) if bias else None
        if order is not None:
            weight, vector = order(weight), order(vector) if vector is not None else None
        made = Linear(self.operations, weight, vector, scheme)
        with self._lock:
            self.nbytes += made.nbytes - weight.nbytes - (vector.nbytes if vector is not None else 0)
        return made

    def embedding(self, name: str, rows: int, width: int) -> Embedding:
        """The table `name`.weight, [rows, width]."""
        return Embedding(self.operations, self.tensor(f"{name}.weight", rows, width))

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this tensor, for names that changed over the years."""
        return False

    def head(self, name: str, in_features: int, out_features: int, bias: bool = False) -> Linear | None:
        """The output layer `name`, if the model is to have one."""
        if self.headless:
            return None
        return self.linear(name, in_features, out_features, bias, scheme=self._head_scheme)

    def tied_head(self, embedding: Embedding, bias: str | None = None) -> Linear | None:
        """The embedding as output layer. A packed copy costs memory, and pays: it is read every step."""
        if self.headless:
            return None
        rows = embedding.weight.shape[0]
        vector = self.tensor(bias, rows) if bias is not None else None
        head = Linear(self.operations, embedding.weight, vector, self._head_scheme)
        if head.copied:
            self.nbytes += head.nbytes - (vector.nbytes if vector is not None else 0)
        return head

    def rms_norm(self, name: str, width: int, eps: float) -> RMSNorm:
        """The norm `name`."""
        return RMSNorm(self.operations, self.tensor(f"{name}.weight", width), eps)

    def layer_norm(self, name: str, width: int, eps: float) -> LayerNorm:
        """The norm `name`, with bias."""
        weight, bias = (self.tensor(f"{name}.{part}", width) for part in ("weight", "bias"))
        return LayerNorm(self.operations, weight, bias, eps)

    def expect_layers(self, count: int) -> None:  # noqa: B027
        """Refuse a checkpoint with fewer layers, before the first of them is loaded."""

    def finish(self, tied: bool) -> None:  # noqa: B027
        """Call after the last tensor; tied: the output layer is the embedding."""

    def close(self) -> None:  # noqa: B027
        """Release what is open; may be called twice."""


def ungroup_qkv(config: ModelConfig) -> RowOrder:
    """Rows fused per KV head, [(q … q k v) (q … q k v) …], into the order [q … | k … | v …] of Attention."""
    kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads

    def order(rows: torch.Tensor) -> torch.Tensor:
        groups = rows.view(kv_heads, group + 2, config.head_dim, *rows.shape[1:])
        return torch.cat(
            (
                groups[:, :group].flatten(0, 2),
                groups[:, group].flatten(0, 1),
                groups[:, group + 1].flatten(0, 1),
            )
        )

    return order


class DummyWeights(Weights):
    """Seeded random tensors of the right shapes, for benchmarks: no file is read.

    Matrices are cut from one stretch of normal numbers (std 1/√in), whose prime length keeps rows different.
    """

    _STRETCH = 1_048_573

    def __init__(self, operations: Operations, scheme: str | None = None, seed: int = 0) -> None:
        super().__init__(operations, scheme)
        generator = torch.Generator().manual_seed(seed)
        self._numbers = torch.randn(self._STRETCH, generator=generator)

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        rows, width = shape
        first = zlib.crc32(name.encode()) % self._STRETCH
        numbers = torch.cat((self._numbers[first:], self._numbers[:first])).mul_(width**-0.5).to(self.dtype)
        out = torch.empty(rows * width, dtype=self.dtype)
        for begin in range(0, out.numel(), self._STRETCH):
            piece = out[begin : begin + self._STRETCH]
            piece.copy_(numbers[: piece.numel()])
        return out.view(shape)


class SafetensorsWeights(Weights):
    """The memory-mapped *.safetensors files of a model directory."""

    def __init__(
        self,
        directory: Path,
        operations: Operations,
        progress: Callable[[int, int], None] | None = None,
        scheme: str | None = None,
        fp8: StoredFp8 | None = None,
    ) -> None:
        """Open all files. Raises ModelLoadError for missing, truncated or corrupt files, and what is none.

        progress: called with (bytes done, bytes in all) after each tensor, by one thread at a time.
        fp8: how weights are stored that are in it.
        """
        super().__init__(operations, scheme)
        self._fp8 = fp8
        self._progress = progress
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        self._asked: set[str] = set()
        self._done = 0
        self.index, files = find_safetensors(directory)
        self._total = sum(file.stat().st_size for file in files)
        try:
            for file in files:
                opened = self._files[file] = self._stack.enter_context(_open(file))
                for name in opened.keys():  # noqa: SIM118
                    if (other := self._where.setdefault(name, file)) is not file:
                        raise ModelLoadError(
                            f"{shown(file)}: tensor {shown(name)} is also in {shown(Path(other.name))}.",
                            advice="Download the checkpoint again; each tensor belongs to one file.",
                        )
        except ModelLoadError:
            self._stack.close()
            raise

    def expect_layers(self, count: int) -> None:
        """Compare with the names in the files' headers."""
        found = (_LAYER.search(name) for name in self._where)
        there = max((int(match[1]) + 1 for match in found if match is not None), default=0)
        if count > there:
            raise ModelLoadError(
                f"{shown(self.index)} holds {there} layers, but config.json calls for {count} "
                "(num_hidden_layers).",
                advice="The checkpoint is incomplete, or config.json belongs to another one.",
            )

    def has(self, name: str) -> bool:
        """Whether one of the files has this tensor."""
        return self._spelt(name) in self._where

    def _spelt(self, name: str) -> str:
        """The name that a tensor has in these files: with or without what stands before it, and as old
        checkpoints of BERT call the weights of norms."""
        if name in self._where:
            return name
        bare = next((name.removeprefix(each) for each in _PREFIXES if name.startswith(each)), name)
        old = bare.replace(".LayerNorm.weight", ".LayerNorm.gamma").replace(
            ".LayerNorm.bias", ".LayerNorm.beta"
        )
        for spelling in (each + one for one in (bare, old) for each in ("", *_PREFIXES)):
            if spelling in self._where:
                return spelling
        return name

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        name = self._spelt(name)
        tensor = self._opened(name, f" of shape {list(shape)}")
        if tensor.shape != shape:
            raise ModelLoadError(
                f"{self._where[name]}: tensor {name!r} has shape {list(tensor.shape)}, "
                f"but config.json calls for {list(shape)}.",
            )
        if tensor.dtype == FP8 and self._fp8 is not None and tensor.ndim == 2:
            return self._restored(name, tensor, self._fp8.block)
        if tensor.dtype not in _DTYPES:
            raise self._unsupported(name, tensor)
        return tensor

    def _opened(self, name: str, what: str = "") -> torch.Tensor:
        """A tensor of these files by its name there; what: said of one that is missing."""
        file = self._where.get(name)
        if file is None:
            raise ModelLoadError(
                f"{self.index}: tensor {name!r}{what} is missing.",
                advice="The checkpoint is incomplete, or config.json belongs to another one.",
            )
        try:
            tensor: torch.Tensor = self._files[file].get_tensor(name)
        except _BROKEN as error:
            raise ModelLoadError(
                f"{shown(file)}: tensor {name!r} cannot be read: {shown(str(error))}.",
                advice="Download it again.",
            ) from error
        with self._lock:
            self._asked.add(name)
            self._done += tensor.nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)
        return tensor

    def _restored(self, name: str, values: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
        """A weight that is stored in fp8, on the device: there it is restored fastest, and half as long on
        its way."""
        names = [name.removesuffix("weight") + scale for scale in SCALES]
        found = next((each for each in names if each in self._where), names[-1])
        scales = self._opened(found, f", the scale of {name!r},")
        if scales.dtype not in _DTYPES:
            raise self._unsupported(found, scales)
        try:
            return restore_fp8(self._sent(values), self._sent(scales), block, self.dtype)
        except ValueError as error:
            raise ModelLoadError(f"{self._where[found]}: tensor {found!r}: {error}.") from None

    def _unsupported(self, name: str, tensor: torch.Tensor) -> ModelLoadError:
        return ModelLoadError(
            f"{self._where[name]}: tensor {name!r} has dtype {str(tensor.dtype).removeprefix('torch.')}, "
            "which is not supported.",
            advice="Supported: float32, float16, bfloat16.",
        )

    def finish(self, tied: bool) -> None:
        """Refuse tensors that nothing asked for, and close the files."""
        ignored = {"lm_head.weight"} if tied else set()
        extra = [
            name
            for name in self._where
            if name not in self._asked | ignored
            and not _COMPUTED.search(name)
            and not (self.headless and _HEADS.search(name))
            and not (self._fp8 is not None and UNUSED.search(name))
        ]
        self.close()
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            raise ModelLoadError(
                f"{self._where[extra[0]]}: unexpected tensors {', '.join(map(repr, extra[:3]))}{more}.",
                advice="The checkpoint has parts that its config.json does not describe.",
            )
        if self._progress is not None:
            self._progress(self._total, self._total)

    def close(self) -> None:
        """Unmap the files."""
        self._stack.close()
        self._files.clear()


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except _BROKEN as error:
        raise ModelLoadError(
            f"{shown(file)} is truncated or corrupt ({file.stat().st_size} bytes): {shown(str(error))}.",
            advice="Download it again.",
        ) from error
    except OSError as error:
        raise ModelLoadError(f"{shown(file)} cannot be read: {shown(str(error))}.") from error
