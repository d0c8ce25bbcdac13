"""What a store asks of the place that its files lie in: a folder, or a bucket with a mirror on this machine."""

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from kubetuner.artifacts import ShardEntry

SHARDS = "shards"
INDEX = "index"


@dataclass(frozen=True)
class Stored:
    """One file of a store.

    Attributes:
        name: ``shards/<sha256>.safetensors``, ``index/<namespace>/<sha256>.json``, or what a killed writer left there.
        bytes: Its size.
        touched: When an index entry was last claimed, or another file last written, in seconds since 1970.
        version: What a bucket knows this state of the file by; empty in a folder.
    """

    name: str
    bytes: int
    touched: float
    version: str = ""

    @property
    def namespace(self) -> str:
        """The namespace of an index entry."""
        return PurePosixPath(self.name).parent.name

    @property
    def shard(self) -> str:
        """File name of the shard that an index entry belongs to."""
        return f"{PurePosixPath(self.name).stem}.safetensors"

    @property
    def file(self) -> str:
        """The name without its folders."""
        return PurePosixPath(self.name).name


class Lease:
    """A shard that stays on this machine until it is released, or this object is gone.

    Attributes:
        path: Where it is.
        size: Its bytes.
    """

    def __init__(self, path: Path, size: int, release: Callable[[], None] = lambda: None) -> None:
        self.path, self.size = path, size
        self.release = weakref.finalize(self, release)


class Files(Protocol):
    """The files of a store, by name.

    Every method raises :class:`~kubetuner.errors.ArtifactError` where the place cannot be used: there is no such
    bucket, access is denied, it does not answer.
    """

    @property
    def place(self) -> str:
        """The folder or address, for messages."""

    @property
    def readers(self) -> int:
        """How many reads at once pay off."""

    @property
    def leased_bytes(self) -> float:
        """How much a reader may have leased at once; it gives back the shards it used longest ago."""

    def path(self, file: str) -> Path:
        """Where on this machine the shard ``file`` is, or would be."""

    def listing(self, folder: str) -> list[Stored]:
        """All files anywhere below ``folder``, sorted by name; none where it was never written."""

    def read(self, name: str) -> bytes | None:
        """A small file; ``None`` when it is not there."""

    def read_start(self, file: str, length: int) -> bytes:
        """The first ``length`` bytes of the shard ``file``, or all where it is shorter."""

    def write(self, name: str, data: bytes) -> None:
        """Put a small file in place, whole or not at all."""

    def write_shard(self, shard: ShardEntry, data: bytes) -> None:
        """Put a shard in place, whole or not at all, also where a damaged one is; known as sound from then on."""

    def claim(self, names: Collection[str]) -> None:
        """Note that the index entries are used now; where the store can only be read, nothing happens."""

    def damages(self, shards: Iterable[ShardEntry]) -> dict[str, str]:
        """What is wrong with those of ``shards`` that are missing or damaged, by file; reads only doubtful ones."""

    def damaged_bytes(self, file: str) -> str:
        """What is wrong with the shard ``file`` by the checksum of all its bytes, or nothing."""

    def lease(self, file: str) -> Lease:
        """The shard ``file`` on this machine, its checksum compared once in the life of this object.

        Raises:
            DamagedError: It is missing or damaged.
        """

    def expect(self, shards: Sequence[ShardEntry]) -> bool:
        """Say that all of ``shards`` will be leased; returns whether they fit on this machine together.

        Where they do not, :meth:`fetch_ahead` pays off.
        """

    def fetch_ahead(self, batches: Sequence[Collection[str]]) -> None:
        """Say which shards the next batches read, the first of them now; takes the place of what was said before."""

    def remove(self, file: Stored) -> None:
        """Remove a file, unless it has changed since it was listed or cannot be removed."""

    def remove_unclaimed(self, shard: Stored, entries: Sequence[Stored], since: float) -> bool:
        """Remove a shard and its index ``entries`` unless one was claimed at ``since`` or later; returns whether."""

    def check(self) -> None:
        """Find out whether the place can be read and written.

        Raises:
            ArtifactError: It cannot; the message says what to do.
        """


class DamagedError(Exception):
    """A shard is missing or damaged; the text says which of the two, and how it shows."""
