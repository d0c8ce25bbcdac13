"""Rows of JSON Lines files that stay on disk: whatever their number, memory holds a few bytes for each."""

import hashlib
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Generic

import numpy as np

from kubetuner.artifacts import RecordT


class RowFile(Generic[RecordT]):
    """The rows of some files, by position in the order of the files; each is parsed when it is asked for."""

    def __init__(self, row_type: type[RecordT]) -> None:
        self._type = row_type
        self._files: list[int] = []
        # Offsets count on from file to file: where each starts, and where each row ends.
        self._starts: list[int] = []
        self._ends = array("Q", [0])

    def add(self, path: Path) -> Iterator[tuple[int, RecordT]]:
        """Append the rows of the file at ``path``; yields them with their positions, and must be exhausted."""
        with path.open("rb") as stream:
            self._files.append(os.dup(stream.fileno()))
            self._starts.append(self._ends[-1])
            for line in stream:
                self._ends.append(self._ends[-1] + len(line))
                yield len(self) - 1, self._type.model_validate_json(line)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, position: int) -> RecordT:
        start, end = self._ends[position], self._ends[position + 1]
        file = bisect_right(self._starts, start) - 1
        return self._type.model_validate_json(os.pread(self._files[file], end - start, start - self._starts[file]))

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
