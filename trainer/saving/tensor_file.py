"""Safetensors files as one header and one block of bytes: staged in host memory, read by ranges.

The library's own writer copies every tensor into bytes of its own, and its reader wants a file on this machine; a
checkpoint is written from buffers that are kept and read from object stores, so the few lines of the format are here.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from trainer.engines.engine import TensorPart
from trainer.saving.certificate import CheckpointError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_LONGEST_HEADER = 100 << 20  # the library's own limit
_GUESS = 64 << 10


def key(part: TensorPart) -> str:
    return f"{part.group}/{part.name}"


class StagedFile:
    """A safetensors file in host memory. The block of bytes is allocated once and filled anew for every save; it is
    pinned where the tensors come from a GPU."""

    def __init__(self) -> None:
        self.header = b""
        self._block = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def fill(self, parts: Sequence[TensorPart]) -> None:
        """Copy the parts' elements; when it returns they may change again."""
        # Wider elements first: then every tensor lies at a multiple of its element size.
        ordered = sorted(parts, key=lambda part: -part.local.element_size())
        on_gpu = any(part.local.device.type == "cuda" for part in parts)
        total = sum(part.local.numel() * part.local.element_size() for part in parts)
        if self._block.numel() != total:
            self._block = torch.empty(0, dtype=torch.uint8)  # the old block goes before the new one comes
            self._block = _pinned(total) if on_gpu else torch.empty(total, dtype=torch.uint8)
        entries: dict[str, dict[str, object]] = {}
        position = 0
        for part in ordered:
            end = position + part.local.numel() * part.local.element_size()
            self._block[position:end].view(part.local.dtype).copy_(part.local, non_blocking=True)
            shape = [part.local.numel()]
            entries[key(part)] = {"dtype": NAMES[part.local.dtype], "shape": shape, "data_offsets": [position, end]}
            position = end
        if on_gpu:
            torch.cuda.synchronize()
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self._block.numel()

    def cut(self, start: int, end: int) -> bytes:
        """A copy of the file's bytes [start, end)."""
        first = len(self.header)
        block = self._block.numpy().data[max(start - first, 0) : max(end - first, 0)]
        return self.header[start:end] + bytes(block)

    def pieces(self, longest: int = 16 << 20) -> Iterator[memoryview]:
        """The file's bytes from first to last, without a copy."""
        yield memoryview(self.header)
        block = self._block.numpy().data
        for start in range(0, len(block), longest):
            yield block[start : start + longest]


def _pinned(size: int) -> Tensor:
    """Page-locked host memory [bytes]. torch's own allocator rounds up to a power of two, which doubles large blocks."""
    block = torch.empty(size, dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    failed = int(runtime.cudaHostRegister(block.data_ptr(), size, 0))
    if failed:
        raise CheckpointError(
            f"{size / 1e9:.1f} GB of host memory for saving cannot be page-locked (CUDA error {failed}): raise the limit "
            "of locked memory (ulimit -l), or give the node more memory"
        )
    weakref.finalize(block, runtime.cudaHostUnregister, block.data_ptr())
    return block


class FileIndex:
    """Where the tensors of a safetensors file begin, from its header. read(start, size): bytes of the file."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, where: str) -> None:
        self._where, self._size = where, size
        try:
            first = read(0, min(_GUESS, size))
            length = int.from_bytes(first[:8], "little")
            if len(first) < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError("no header")
            self._data = 8 + length
            text = first[8 : self._data]
            if len(text) < length:
                text += read(len(first), self._data - len(first))
            self._entries = {str(name): entry for name, entry in json.loads(text).items()}
        except (ValueError, AttributeError) as error:
            raise self._damaged(str(error)) from error

    def begin(self, name: str, dtype: torch.dtype, length: int) -> int:
        """Byte at which the 1-D tensor `name` begins; CheckpointError where the file holds it otherwise or not."""
        try:
            entry = self._entries[name]
            begin, end = (self._data + int(offset) for offset in entry["data_offsets"])
            shape, found = list(entry["shape"]), entry["dtype"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"no usable entry {name}") from error
        if found != NAMES[dtype] or shape != [length] or end - begin != length * dtype.itemsize or end > self._size:
            raise self._damaged(f"{name} is {found} {shape} where the certificate says {dtype} [{length}]")
        return begin

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._where} is damaged ({why}): use an earlier checkpoint, or restore the file")


def as_dtype(name: str, where: str) -> torch.dtype:
    """The dtype that a certificate names; CheckpointError for one that no file can hold."""
    dtype = getattr(torch, name, None)
    if dtype not in NAMES:
        raise CheckpointError(f"{where} names the unknown dtype {name!r}: its certificate is damaged")
    return dtype


def elements(block: Tensor, begin: int, like: Tensor) -> Tensor:
    """Elements of `like`'s dtype and number in a uint8 block, from byte `begin` on, a multiple of their size."""
    return block[begin : begin + like.numel() * like.element_size()].view(like.dtype)
