"""The content-addressed store of encoded samples: shards named by their bytes, found by sample key.

::

    <root>/shards/<sha256>.safetensors          tensors named "<key>.<name>"
    <root>/index/<namespace>/<sha256>.json      which keys the shard holds; written after the shard, by rename

A shard without an index entry is invisible, so a writer that is killed at any byte leaves nothing half-written behind.
Shards are never changed: new samples go to new shards.

Reading every byte of a large store at the start of every step would take longer than the step. So an index entry notes
when its shard was last written, and only a shard whose file looks different is hashed again. Bytes that changed behind
the file system's back are found when the shard is opened for reading (:meth:`Store.verify_bytes`) or by ``kubetuner
cache verify``. The modification time of an index entry is the last time a step claimed its shard; ``kubetuner cache
gc`` goes by it.
"""

import logging
import os
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from kubetuner.artifacts import Record, ShardEntry, sha256_of, write_atomically
from kubetuner.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

STORE_VARIABLE = "KUBETUNER_STORE"
# How often a step at work says again which shards it needs; far below the day that gc leaves every claim.
RENEWAL_SECONDS = 3600.0
# New shards are dated this far back, so that whatever changes them, however soon, changes their date.
_DATED_BACK_NS = 10 * 10**9


class IndexEntry(Record):
    """The index entry of one shard.

    Attributes:
        shard: The shard.
        keys: Its samples.
        mtime_ns: Modification time of the shard's file when its checksum was last known to be right.
    """

    shard: ShardEntry
    keys: tuple[str, ...]
    mtime_ns: int = 0


class Store:
    """A store in the folder ``root``; made on the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sound: set[str] = set()
        self._claims: set[Path] = set()
        self._renewed = time.monotonic()

    def path(self, file: str) -> Path:
        """Where the shard called ``file`` lies."""
        return self.root / "shards" / file

    def known(self, namespace: str, wanted: Collection[str] | None = None) -> dict[str, ShardEntry]:
        """Sample key → shard, for those of the ``wanted`` keys (default: all) that are in ``namespace``.

        Their shards are claimed. One whose size or checksum is wrong is named in the log and forgotten, so its samples
        are encoded again.
        """
        found: dict[str, ShardEntry] = {}
        for entry in sorted((self.root / "index" / namespace).glob("*.json")):
            index = self.read_entry(entry)
            if index is None:
                entry.unlink(missing_ok=True)
                continue
            keys = index.keys if wanted is None else [key for key in index.keys if key in wanted]
            if keys and self._claimed_and_sound(entry, index):
                found.update(dict.fromkeys(keys, index.shard))
        return found

    def write_shard(self, namespace: str, samples: Mapping[str, Mapping[str, "Tensor"]]) -> ShardEntry:
        """Store ``samples`` (key → name → contiguous CPU tensor) as one shard, the index entry last."""
        from safetensors.torch import save_file

        tensors = {
            f"{key}.{name}": tensor.contiguous() for key in sorted(samples) for name, tensor in samples[key].items()
        }
        # Not the process id: pods that share a store have the same one.
        staging = self.root / "shards" / f".writing-{uuid.uuid4().hex}"
        write_atomically(staging, lambda path: save_file(tensors, path))
        digest = sha256_of(staging)
        shard = ShardEntry(
            file=f"{digest}.safetensors", samples=len(samples), bytes=staging.stat().st_size, sha256=digest
        )
        dated = time.time_ns() - _DATED_BACK_NS
        os.utime(staging, ns=(dated, dated))
        staging.replace(self.path(shard.file))
        entry = self.root / "index" / namespace / f"{digest}.json"
        mtime_ns = self.path(shard.file).stat().st_mtime_ns
        self._write_entry(entry, IndexEntry(shard=shard, keys=tuple(sorted(samples)), mtime_ns=mtime_ns))
        self._claims.add(entry)
        self.renew_claims()
        return shard

    def tensor_names(self, shard: ShardEntry) -> frozenset[str]:
        """Names of the tensors that each sample of ``shard`` has, from the file's header."""
        from safetensors import safe_open

        with safe_open(self.path(shard.file), framework="np") as file:
            return frozenset(key.partition(".")[2] for key in file.keys())  # noqa: SIM118

    def entries(self, file: str = "*") -> list[Path]:
        """The index entries of the shard called ``file``, or of all shards."""
        return sorted((self.root / "index").glob(f"*/{Path(file).stem}.json"))

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
        """Check that a shard is there and, where its file looks different from when it was written, its checksum.

        Raises:
            ArtifactError: It is missing or damaged; names the file and the step to run again.
        """
        indexed = [index for entry in self.entries(shard.file) if (index := self.read_entry(entry)) is not None]
        self._verify(shard, {index.mtime_ns for index in indexed})

    def verify_bytes(self, file: str) -> None:
        """Check the checksum of the shard called ``file``, once in the life of this object.

        A damaged one is forgotten, so that the next cache step encodes its samples again.

        Raises:
            ArtifactError: It is missing or damaged.
        """
        if file in self._sound:
            return
        path = self.path(file)
        if not path.is_file() or sha256_of(path) != path.stem:
            for entry in self.entries(file):
                if os.access(entry.parent, os.W_OK):
                    entry.unlink(missing_ok=True)
            raise _damaged(path)
        self._sound.add(file)

    def read_entry(self, entry: Path) -> IndexEntry | None:
        """An index entry; ``None`` when it cannot be read or was removed since it was listed."""
        try:
            return IndexEntry.model_validate_json(entry.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as problem:
            logger.warning("%s cannot be read, its samples are encoded again: %s", entry, problem)
            return None

    def _claimed_and_sound(self, entry: Path, index: IndexEntry) -> bool:
        """Claim a shard, then look at it: what ``gc`` took before the claim is missing now."""
        self._claims.add(entry)
        _mark([entry])
        try:
            self._verify(index.shard, {index.mtime_ns})
            mtime_ns = self.path(index.shard.file).stat().st_mtime_ns
        except (ArtifactError, FileNotFoundError) as problem:
            logger.warning("its samples are encoded again: %s", problem)
            entry.unlink(missing_ok=True)
            return False
        if mtime_ns != index.mtime_ns:
            self._write_entry(entry, index.model_copy(update={"mtime_ns": mtime_ns}))
        return True

    def _verify(self, shard: ShardEntry, stamps: Collection[int]) -> None:
        path = self.path(shard.file)
        try:
            file = path.stat()
        except FileNotFoundError:
            raise _damaged(path) from None
        if file.st_size != shard.bytes:
            raise _damaged(path)
        if file.st_mtime_ns not in stamps:
            self.verify_bytes(shard.file)

    def _write_entry(self, entry: Path, index: IndexEntry) -> None:
        text = index.model_dump_json()
        write_atomically(entry, lambda path: path.write_text(text, encoding="utf-8"))


def _mark(entries: Iterable[Path]) -> None:
    """Set the modification time of index entries to now."""
    for entry in entries:
        if os.access(entry, os.W_OK):
            with suppress(FileNotFoundError):
                os.utime(entry)


def _damaged(path: Path) -> ArtifactError:
    return ArtifactError(f"shard {path} is missing or damaged; run cache_vae and cache_text_embeds again")


def resolve_store(artifact_folder: Path) -> Store:
    """The store named by ``KUBETUNER_STORE``; without it, the artifact's own folder."""
    configured = os.environ.get(STORE_VARIABLE, "")
    return Store(Path(configured) if configured else artifact_folder)
