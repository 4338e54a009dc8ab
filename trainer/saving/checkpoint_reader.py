"""Fill tensors from the ranges of a checkpoint's files, wherever they lie and however they were cut.

What is asked for is read in spans of some megabytes, several side by side: on an object store every request waits, and
a span is all that a rank needs beside the tensors that it fills.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.engines.engine import TensorPart
from trainer.saving import checkpoint_store
from trainer.saving.certificate import Certificate, CheckpointError, Range
from trainer.saving.checkpoint_store import CheckpointStore
from trainer.saving.tensor_file import FileIndex, elements, key

SPAN = 16 << 20
"""Bytes of one read."""
GAP = 256 << 10
"""Two pieces so close to each other are one read."""
READERS = 4
"""Spans read side by side."""


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file from `begin` on are the elements of `target`."""

    file: str
    begin: int
    target: Tensor

    @property
    def end(self) -> int:
        return self.begin + self.target.numel() * self.target.element_size()


@dataclass
class _Span:
    """Neighbouring pieces of one file. begin is a multiple of 8, so that elements lie aligned in what is read."""

    file: str
    begin: int
    end: int
    pieces: list[_Piece] = field(default_factory=list)


class CheckpointReader:
    """A complete checkpoint. Raises CheckpointError, or DataError of the store, naming the file and the remedy."""

    def __init__(self, store: CheckpointStore, name: str) -> None:
        self.url = f"{store.url}/{name}"
        self._store, self._name = store, name
        self._sizes = store.listing().get(name, {})
        self.certificate: Certificate = checkpoint_store.checked(store, name, self._sizes)
        self._indexes: dict[str, FileIndex] = {}

    def fill(self, parts: Iterable[TensorPart]) -> None:
        """Fill the local views of parts of tensors that the checkpoint has, in their shapes and dtypes."""
        pieces = [piece for part in parts for piece in self._pieces(part)]
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(self._read, _spans(pieces)):
                pass

    def index(self, file: str) -> FileIndex:
        """Where the tensors of one of the files lie."""
        if file not in self._indexes:

            def read(start: int, size: int) -> bytes:
                block = bytearray(size)
                self._store.read_into(self._name, file, start, memoryview(block))
                return bytes(block)

            self._indexes[file] = FileIndex(read, self._sizes[file], f"{self.url}/{file}")
        return self._indexes[file]

    def _pieces(self, part: TensorPart) -> list[_Piece]:
        found, filled = [], 0
        end_of_part = part.start + part.local.numel()
        for saved in self.certificate.tensors[part.group][part.name].ranges:
            begin, end = max(part.start, saved.start), min(end_of_part, saved.start + saved.length)
            if begin < end:
                found += self._cut(saved, begin, part.local[begin - part.start : end - part.start])
                filled += end - begin
        if filled != part.local.numel():
            raise CheckpointError(f"{self.url} lacks elements of {key(part)}: its certificate is damaged")
        return found

    def _cut(self, saved: Range, begin: int, target: Tensor) -> list[_Piece]:
        """Pieces no longer than a span, for the elements of the whole tensor from `begin` on."""
        width = target.element_size()
        first = self.index(saved.file).begin(saved.key, target.dtype, saved.length) + (begin - saved.start) * width
        step = SPAN // width
        return [
            _Piece(saved.file, first + start * width, target[start : start + step])
            for start in range(0, target.numel(), step)
        ]

    def _read(self, span: _Span) -> None:
        block = torch.empty(span.end - span.begin, dtype=torch.uint8)
        self._store.read_into(self._name, span.file, span.begin, block.numpy().data)
        with torch.no_grad():
            for piece in span.pieces:
                piece.target.copy_(elements(block, piece.begin - span.begin, piece.target))


def _spans(pieces: Sequence[_Piece]) -> list[_Span]:
    spans: list[_Span] = []
    for piece in sorted(pieces, key=lambda piece: (piece.file, piece.begin)):
        last = spans[-1] if spans else None
        if last is None or last.file != piece.file or piece.begin > last.end + GAP or piece.end > last.begin + SPAN:
            spans.append(last := _Span(piece.file, piece.begin // 8 * 8, piece.end))
        last.pieces.append(piece)
        last.end = max(last.end, piece.end)
    return spans
