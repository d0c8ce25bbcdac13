"""Content keys of very many samples and the shard that each is in, in about 50 bytes a sample.

As strings in a dictionary they would take five times as much.
"""

from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from kubetuner.artifacts import ShardEntry

# A shard of latents is written, and so survives a kill, after this many encoded samples.
SAMPLES_PER_SHARD = 256
_NOWHERE = -1


class Keys:
    """Content keys (SHA-256, hex) by position; equal ones share a shard."""

    def __init__(self, keys: Iterable[str]) -> None:
        digests = bytearray()
        for key in keys:
            digests += bytes.fromhex(key)
        # numpy drops zeros at the end of such a value where one is taken out; in comparisons they do no harm.
        values = np.frombuffer(digests, dtype="S32")
        # np.unique does the same and takes twice the memory meanwhile.
        order = np.argsort(values, kind="stable").astype(np.uint32)
        ordered = values[order]
        del digests, values
        new = np.ones(len(ordered), dtype=bool)
        new[1:] = ordered[1:] != ordered[:-1]
        self._numbers = np.empty(len(order), dtype=np.uint32)
        self._numbers[order] = np.cumsum(new, dtype=np.uint32) - np.uint32(1)
        self._distinct, self._first = (ordered, order) if new.all() else (ordered[new], order[new])
        self._shard = np.full(len(self._distinct), _NOWHERE, dtype=np.int32)
        self._shards: list[ShardEntry] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, position: int) -> str:
        number = int(self._numbers[position])
        return self._distinct[number : number + 1].tobytes().hex()

    def numbers(self, keys: Collection[str]) -> NDArray[np.int64]:
        """The numbers of those of ``keys`` that are here, for :meth:`put`."""
        if not keys or not len(self._distinct):
            return np.empty(0, dtype=np.int64)
        wanted = np.frombuffer(bytes.fromhex("".join(keys)), dtype="S32")
        near = np.searchsorted(self._distinct, wanted).clip(max=len(self._distinct) - 1)
        found: NDArray[np.int64] = near[self._distinct[near] == wanted]
        return found

    def lacking(self, keys: Collection[str]) -> NDArray[np.int64]:
        """As :meth:`numbers`, of those that are in no shard yet."""
        found = self.numbers(keys)
        lacking: NDArray[np.int64] = found[self._shard[found] == _NOWHERE]
        return lacking

    def find(self, key: str) -> ShardEntry | None:
        """The shard that ``key`` is in; ``None`` where there is none, or no such key."""
        for number in self.numbers([key]):
            return None if self._shard[number] == _NOWHERE else self._shards[self._shard[number]]
        return None

    def put(self, numbers: NDArray[np.int64], shard: ShardEntry) -> None:
        """Note that these keys are in ``shard``; what was noted of them before is forgotten."""
        self._shard[numbers] = len(self._shards)
        self._shards.append(shard)

    def shard(self, position: int) -> ShardEntry | None:
        """The shard that the key at ``position`` is in, or ``None``."""
        number = int(self._shard[self._numbers[position]])
        return None if number == _NOWHERE else self._shards[number]

    def shards(self) -> tuple[ShardEntry, ...]:
        """Every shard that a key is in, by file name."""
        used = np.unique(self._shard[self._shard != _NOWHERE])
        return tuple(sorted((self._shards[number] for number in used), key=lambda shard: shard.file))

    def firsts(self) -> NDArray[np.uint32]:
        """The first position of every key, in the order of the keys."""
        return self._first

    def missing(self) -> NDArray[np.uint32]:
        """The first position of every key that is in no shard, in the order of the keys."""
        first: NDArray[np.uint32] = self._first[self._shard == _NOWHERE]
        return first
