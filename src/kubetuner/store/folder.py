"""A store's files in a folder: a local disk or a shared volume."""

import os
import stat
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from kubetuner.artifacts import ShardEntry, write_atomically
from kubetuner.digests import sha256_of
from kubetuner.replacing import write_bytes
from kubetuner.store.files import INDEX, SHARDS, DamagedError, Lease, Stored

WRONG_BYTES = "is damaged (its bytes do not have the checksum in its name)"


class Folder:
    """Files below ``root``, which is made on the first write.

    A shard whose checksum was right gets a modification time made of that checksum; only one with another time is
    hashed again. The modification time of an index entry is its claim.
    """

    readers = 1
    leased_bytes = float("inf")

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = str(root)
        self._hashed: set[str] = set()

    def path(self, file: str) -> Path:
        """See :class:`Files`."""
        return self.root / SHARDS / file

    def listing(self, folder: str) -> list[Stored]:
        """See :class:`Files`."""
        found = []
        for path in sorted((self.root / folder).rglob("*")):
            with suppress(FileNotFoundError):
                status = path.stat()
                if stat.S_ISDIR(status.st_mode):
                    continue
                # Shards are not dated by the clock.
                claimed = folder.startswith(INDEX) and path.suffix == ".json"
                touched = status.st_mtime if claimed else status.st_ctime
                found.append(Stored(path.relative_to(self.root).as_posix(), status.st_size, touched))
        return found

    def read(self, name: str) -> bytes | None:
        """See :class:`Files`."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def read_start(self, file: str, length: int) -> bytes:
        """See :class:`Files`."""
        with self.path(file).open("rb") as stream:
            return stream.read(length)

    def write(self, name: str, data: bytes) -> None:
        """See :class:`Files`."""
        write_bytes(str(self.root / name), data)

    def write_shard(self, shard: ShardEntry, data: bytes) -> None:
        """See :class:`Files`."""

        def fill(temporary: Path) -> None:
            temporary.write_bytes(data)
            date(temporary, shard.sha256)

        write_atomically(self.path(shard.file), fill)

    def claim(self, names: Collection[str]) -> None:
        """See :class:`Files`."""
        for name in names:
            if os.access(self.root / name, os.W_OK):
                with suppress(FileNotFoundError):
                    os.utime(self.root / name)

    def damages(self, shards: Iterable[ShardEntry]) -> dict[str, str]:
        """See :class:`Files`."""
        return {shard.file: damage for shard in shards if (damage := self._damage(shard))}

    def damaged_bytes(self, file: str) -> str:
        """See :class:`Files`."""
        path = self.path(file)
        try:
            if sha256_of(path) != path.stem:
                return WRONG_BYTES
        except FileNotFoundError:
            return "is missing"
        self._hashed.add(file)
        if os.access(path, os.W_OK):
            date(path, path.stem)
        return ""

    def lease(self, file: str) -> Lease:
        """See :class:`Files`."""
        if file not in self._hashed and (damage := self.damaged_bytes(file)):
            raise DamagedError(damage)
        return Lease(self.path(file), 0)

    def expect(self, shards: Sequence[ShardEntry]) -> bool:
        """See :class:`Files`."""
        return True

    def fetch_ahead(self, batches: Sequence[Collection[str]]) -> None:
        """See :class:`Files`."""

    def remove(self, file: Stored) -> None:
        """See :class:`Files`."""
        path = self.root / file.name
        if os.access(path.parent, os.W_OK):
            path.unlink(missing_ok=True)

    def remove_unclaimed(self, shard: Stored, entries: Sequence[Stored], since: float) -> bool:
        """See :class:`Files`."""
        # Steps claim first and look second. So the shard is taken aside first and its claims are looked at second:
        # either we see the claim and put it back, or the step sees that it is missing.
        aside = self.root / SHARDS / f".removing-{uuid.uuid4().hex}"
        try:
            (self.root / shard.name).rename(aside)
        except FileNotFoundError:  # Another gc was faster.
            return False
        if any(self._claimed(entry) >= since for entry in entries):
            aside.rename(self.root / shard.name)
            return False
        for entry in entries:
            (self.root / entry.name).unlink(missing_ok=True)
        aside.unlink()
        return True

    def check(self) -> None:
        """See :class:`Files`. A volume need not be there where the plan is made, so nothing is asked of it."""

    def _claimed(self, entry: Stored) -> float:
        try:
            return (self.root / entry.name).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _damage(self, shard: ShardEntry) -> str:
        try:
            found = self.path(shard.file).stat()
        except FileNotFoundError:
            return "is missing"
        if found.st_size != shard.bytes:
            return f"is damaged: it has {found.st_size} bytes, expected {shard.bytes}"
        return "" if is_dated(found, shard.sha256) else self.damaged_bytes(shard.file)


def date(path: Path, digest: str) -> None:
    """Give a shard the modification time that stands for its checksum; its last access is now."""
    with suppress(FileNotFoundError):
        os.utime(path, ns=(time.time_ns(), _dated(digest)))


def is_dated(status: os.stat_result, digest: str) -> bool:
    """Whether a file has the modification time that stands for the checksum ``digest``."""
    return status.st_mtime_ns == _dated(digest)


def _dated(digest: str) -> int:
    """In nanoseconds, somewhere before 1979."""
    return int(digest[:7], 16) * 10**9
