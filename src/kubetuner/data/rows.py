"""Rows of JSON Lines files that stay on disk: whatever their number, memory holds a byte or less for each."""

import hashlib
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Generic

import numpy as np

from kubetuner.artifacts import RecordT

_BLOCK = 16


class RowFile(Generic[RecordT]):
    """The rows of some files, by position in the order of the files; each is parsed when it is asked for.

    Kept are where every sixteenth row starts, and the sixteen that were read last.
    """

    def __init__(self, row_type: type[RecordT]) -> None:
        self._type = row_type
        self._files: list[int] = []
        # By file: its first position and its first block. By block, and where the last one ends: offset in its file.
        self._firsts: list[int] = []
        self._first_blocks: list[int] = []
        self._starts = array("Q")
        self._length = 0
        self._read: tuple[int, list[bytes]] = (-1, [])

    def add(self, path: Path) -> Iterator[tuple[int, RecordT]]:
        """Append the rows of the file at ``path``; yields them with their positions, and must be exhausted."""
        with path.open("rb") as stream:
            self._files.append(os.dup(stream.fileno()))
            self._firsts.append(len(self))
            self._first_blocks.append(len(self._starts))
            end = 0
            for index, line in enumerate(stream):
                if index % _BLOCK == 0:
                    self._starts.append(end)
                end += len(line)
                self._length += 1
                yield len(self) - 1, self._type.model_validate_json(line)
            self._starts.append(end)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> RecordT:
        file = bisect_right(self._firsts, position) - 1
        block, line = divmod(position - self._firsts[file], _BLOCK)
        return self._type.model_validate_json(self._block(file, self._first_blocks[file] + block)[line])

    def _block(self, file: int, block: int) -> list[bytes]:
        number, lines = self._read
        if number != block:
            start, end = self._starts[block], self._starts[block + 1]
            lines = os.pread(self._files[file], end - start, start).splitlines()
            self._read = block, lines
        return lines

    def __del__(self) -> None:
        for file in self._files:
            os.close(file)


class Positions:
    """Finds the positions of texts among ``texts``, in 12 bytes a text."""

    def __init__(self, texts: Iterable[str]) -> None:
        digests = np.fromiter((_digest(text) for text in texts), dtype=np.uint64)
        self._order = np.argsort(digests, kind="stable").astype(np.uint32)
        self._digests = digests[self._order]

    def of(self, text: str) -> list[int]:
        """Positions that may hold ``text``, the last first; other texts are among them by a chance of 1 in 2⁶⁴."""
        digest = np.uint64(_digest(text))
        first, last = (int(np.searchsorted(self._digests, digest, side)) for side in ("left", "right"))
        return [int(position) for position in self._order[first:last][::-1]]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
