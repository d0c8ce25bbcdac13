"""The content-addressed store of encoded samples: shards named by their bytes, found by sample key.

::

    <root>/shards/<sha256>.safetensors          tensors named "<key>.<name>"
    <root>/index/<namespace>/<sha256>.json      which keys the shard holds; written after the shard, by rename

A shard without an index entry is invisible, so of a writer that is killed at any byte nothing half-written is seen; at
most a ``.tmp`` file stays behind. Shards are never changed: new samples go to new shards.

Reading every byte of a large store at the start of every step would take longer than the step. So a shard whose
checksum was right gets a modification time made of that checksum, and only one with another time is hashed again. Bytes
that changed behind the file system's back are found when the shard is opened for reading (:meth:`Store.verify_bytes`)
or by ``kubetuner cache verify``. The modification time of an index entry is the last time a step claimed its shard;
``kubetuner cache gc`` goes by it.
"""

import hashlib
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from kubetuner.artifacts import Record, ShardEntry, sha256_of, write_atomically, write_text
from kubetuner.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FoundT = TypeVar("FoundT", bound=Sized)

STORE_VARIABLE = "KUBETUNER_STORE"
# How often a step at work says again which shards it needs; far below the day that gc leaves every claim.
RENEWAL_SECONDS = 3600.0


class IndexEntry(Record):
    """The index entry of one shard."""

    shard: ShardEntry
    keys: tuple[str, ...]


class Store:
    """A store in the folder ``root``; made on the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hashed: set[str] = set()
        self._claims: set[Path] = set()
        self._renewed = time.monotonic()

    def path(self, file: str) -> Path:
        """Where the shard called ``file`` lies."""
        return self.root / "shards" / file

    def known(self, namespace: str, wanted: Collection[str] | None = None) -> dict[str, ShardEntry]:
        """Sample key → shard, for those of the ``wanted`` keys (default: all) that are in ``namespace``.

        See :meth:`find`, which is for more keys than memory should hold.
        """

        def among(keys: Sequence[str]) -> list[str]:
            return [key for key in keys if wanted is None or key in wanted]

        return {key: shard for shard, keys in self.find(namespace, among) for key in keys}

    def find(self, namespace: str, among: Callable[[Sequence[str]], FoundT]) -> Iterator[tuple[ShardEntry, FoundT]]:
        """The shards of ``namespace`` that hold wanted keys, with what ``among`` made of these keys.

        Their shards are claimed. One that is damaged is named in the log and its index entry removed, so that its
        samples are encoded again. The file stays: another process may be putting an undamaged one in its place.

        Args:
            namespace: Where to look.
            among: Picks the wanted ones of a shard's keys, in whatever form; empty when none is.
        """
        for entry in sorted((self.root / "index" / namespace).glob("*.json")):
            index = self.read_entry(entry)
            if index is None:
                entry.unlink(missing_ok=True)
                continue
            keys = among(index.keys)
            if not len(keys):
                continue
            # Claimed first and looked at second: what gc took before the claim is missing now.
            self._claims.add(entry)
            _mark([entry])
            if damage := self._damage(index.shard):
                self._forget(index.shard.file, damage)
            else:
                yield index.shard, keys

    def write_shard(self, namespace: str, samples: Mapping[str, Mapping[str, "Tensor"]]) -> ShardEntry:
        """Store ``samples`` (key → name → contiguous CPU tensor) as one shard, the index entry last.

        Equal samples in any order make the same shard: safetensors sorts them.
        """
        from safetensors.torch import save

        tensors = {
            f"{key}.{name}": tensor.contiguous() for key, named in samples.items() for name, tensor in named.items()
        }
        data = save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        shard = ShardEntry(file=f"{digest}.safetensors", samples=len(samples), bytes=len(data), sha256=digest)

        def fill(temporary: Path) -> None:
            temporary.write_bytes(data)
            _date(temporary, digest)

        write_atomically(self.path(shard.file), fill)
        index = IndexEntry(shard=shard, keys=tuple(sorted(samples))).model_dump_json()
        entry = self.root / "index" / namespace / f"{digest}.json"
        write_text(entry, index)
        self._claims.add(entry)
        self.renew_claims()
        return shard

    def shapes(self, shards: Iterable[ShardEntry]) -> dict[str, tuple[int | None, ...]]:
        """Name → shape of the tensors that each sample of ``shards`` has, from the files' headers.

        An axis whose size is not the same in all samples is ``None``.
        """
        from safetensors import safe_open

        seen: dict[str, set[tuple[int, ...]]] = defaultdict(set)
        for shard in shards:
            with safe_open(self.path(shard.file), framework="np") as file:
                for tensor in file.keys():  # noqa: SIM118
                    seen[tensor.partition(".")[2]].add(tuple(file.get_slice(tensor).get_shape()))
        return {
            name: tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*seen[name], strict=True))
            for name in sorted(seen)
        }

    def entries(self, file: str = "*") -> list[Path]:
        """The index entries of the shard called ``file``, or of all shards."""
        return sorted((self.root / "index").glob(f"*/{Path(file).stem}.json"))

    def read_entry(self, entry: Path) -> IndexEntry | None:
        """An index entry; ``None`` when it cannot be read or was removed since it was listed."""
        try:
            return IndexEntry.model_validate_json(entry.read_bytes())
        except FileNotFoundError:  # Another process found its shard damaged first.
            return None
        except ValidationError as problem:
            logger.warning("index entry %s is damaged, its samples are encoded again: %s", entry, problem)
            return None

    def claim(self, shards: Iterable[ShardEntry]) -> None:
        """Say that a step needs ``shards`` from now on; no effect where the store is mounted for reading only."""
        entries = {entry for shard in shards for entry in self.entries(shard.file)}
        self._claims |= entries
        _mark(entries)

    def renew_claims(self) -> None:
        """Say it again if the last time was long ago; for work that takes days."""
        if time.monotonic() - self._renewed > RENEWAL_SECONDS:
            self._renewed = time.monotonic()
            _mark(self._claims)

    def verify(self, shard: ShardEntry) -> None:
        """Check that a shard is there and, unless its date says that its checksum was right, hash it.

        Raises:
            ArtifactError: It is missing or damaged; names the file, what is wrong and the steps to run again.
        """
        if damage := self._damage(shard):
            raise ArtifactError(f"shard {self.path(shard.file)} {damage}; run cache_vae and cache_text_embeds again")

    def verify_bytes(self, file: str) -> None:
        """Hash the shard called ``file``, once in the life of this object.

        A damaged one is forgotten, so that the next cache step encodes its samples again.

        Raises:
            ArtifactError: It is missing or damaged.
        """
        if file in self._hashed:
            return
        if damage := self._damaged_bytes(self.path(file)):
            self._forget(file, damage)
            raise ArtifactError(f"shard {self.path(file)} {damage}; run the step that caches it again")

    def _damage(self, shard: ShardEntry) -> str:
        """What is wrong with a shard, or nothing."""
        path = self.path(shard.file)
        try:
            found = path.stat()
        except FileNotFoundError:
            return "is missing"
        if found.st_size != shard.bytes:
            return f"is damaged: it has {found.st_size} bytes, expected {shard.bytes}"
        return "" if found.st_mtime_ns == _dated(shard.sha256) else self._damaged_bytes(path)

    def _damaged_bytes(self, path: Path) -> str:
        """What is wrong with the shard at ``path`` by its checksum; it is dated when nothing is."""
        try:
            if sha256_of(path) != path.stem:
                return "is damaged (its bytes do not have the checksum in its name)"
        except FileNotFoundError:
            return "is missing"
        self._hashed.add(path.name)
        if os.access(path, os.W_OK):
            _date(path, path.stem)
        return ""

    def _forget(self, file: str, damage: str) -> None:
        """Remove the index entries of a shard, where the store can be written."""
        for entry in self.entries(file):
            index = self.read_entry(entry)
            if index is not None and os.access(entry.parent, os.W_OK):
                logger.warning(
                    "shard %s %s; its %d samples are encoded again", self.path(file), damage, len(index.keys)
                )
                entry.unlink(missing_ok=True)


def _dated(digest: str) -> int:
    """The modification time, in nanoseconds, of a shard with the checksum ``digest``: somewhere before 1979."""
    return int(digest[:7], 16) * 10**9


def _date(path: Path, digest: str) -> None:
    with suppress(FileNotFoundError):
        os.utime(path, ns=(_dated(digest), _dated(digest)))


def _mark(entries: Iterable[Path]) -> None:
    """Set the modification time of index entries to now."""
    for entry in entries:
        if os.access(entry, os.W_OK):
            with suppress(FileNotFoundError):
                os.utime(entry)


def resolve_store(artifact_folder: Path) -> Store:
    """The store named by ``KUBETUNER_STORE``; without it, the artifact's own folder."""
    configured = os.environ.get(STORE_VARIABLE, "")
    return Store(Path(configured) if configured else artifact_folder)
