"""The content-addressed store of encoded samples: shards named by their bytes, found by sample key.

::

    shards/<sha256>.safetensors          tensors named "<key>.<name>"
    index/<namespace>/<sha256>.json      which keys the shard holds; written after the shard, whole or not at all

A shard without an index entry is invisible, so of a writer that is killed at any byte nothing half-written is seen.
Shards are never changed: new samples go to new shards. These files lie in a :class:`~kubetuner.store.folder.Folder` or
in a :class:`~kubetuner.store.bucket.Bucket`; what this module asks of either is :class:`~kubetuner.store.files.Files`.

Reading every byte of a large store at the start of every step would take longer than the step. So a shard carries a
mark that its checksum was right, which any other writing takes away, and only one without it is hashed. Bytes that
changed behind the mark are found when the shard is leased for reading or by ``kubetuner cache verify``. Steps claim the
index entries of what they use; ``kubetuner cache gc`` goes by it.
"""

import hashlib
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from kubetuner.artifacts import Record, ShardEntry
from kubetuner.errors import ArtifactError, InputError
from kubetuner.store.files import INDEX, SHARDS, DamagedError, Files, Lease, Stored
from kubetuner.store.folder import Folder

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

STORE_VARIABLE = "KUBETUNER_STORE"
# How often a step at work says again which shards it needs; far below the day that gc leaves every claim.
RENEWAL_SECONDS = 3600.0
# A claim this young is not made again: many pods that start together would only queue for the same entry.
FRESH_SECONDS = 600.0
# Enough for the header of most shards, which names each tensor.
HEADER_BYTES = 1 << 17

Argument = TypeVar("Argument")
Result = TypeVar("Result")
FoundT = TypeVar("FoundT", bound=Sized)


class IndexEntry(Record):
    """The index entry of one shard."""

    shard: ShardEntry
    keys: tuple[str, ...]


class DamagedShardError(ArtifactError):
    """A shard is missing or damaged; it has been forgotten."""


class Store:
    """A store in ``place``, a folder or other files; made on the first write."""

    def __init__(self, place: Path | Files) -> None:
        self.files: Files = Folder(place) if isinstance(place, Path) else place
        self.place = self.files.place
        self._claims: set[str] = set()
        self._renewed = time.monotonic()

    def path(self, file: str) -> Path:
        """Where on this machine the shard called ``file`` lies, or would; :meth:`lease` makes sure that it does."""
        return self.files.path(file)

    def known(self, namespace: str, wanted: Collection[str] | None = None) -> dict[str, ShardEntry]:
        """Sample key → shard, for those of the ``wanted`` keys (default: all) that are in ``namespace``.

        See :meth:`find`, which is for more keys than memory should hold.
        """

        def among(keys: Sequence[str]) -> list[str]:
            return [key for key in keys if wanted is None or key in wanted]

        return {key: shard for shard, keys in self.find(namespace, among) for key in keys}

    def find(self, namespace: str, among: Callable[[Sequence[str]], FoundT]) -> list[tuple[ShardEntry, FoundT]]:
        """The shards of ``namespace`` that hold wanted keys, with what ``among`` made of these keys.

        Their shards are claimed. One that is damaged is named in the log and its index entry removed, so that its
        samples are encoded again. The file stays: another process may be putting an undamaged one in its place.

        Args:
            namespace: Where to look.
            among: Picks the wanted ones of a shard's keys, in whatever form; empty when none is. Called by threads.
        """

        def chosen(entry: Stored) -> tuple[Stored, ShardEntry, FoundT] | None:
            index = self.read_entry(entry)
            if index is None:
                self.files.remove(entry)
                return None
            keys = among(index.keys)
            return (entry, index.shard, keys) if len(keys) else None

        entries = [entry for entry in self._each(chosen, self.entries(namespace)) if entry is not None]
        # Claimed first and looked at second: what gc took before the claim is missing now.
        self._claim(entry for entry, _, _ in entries)
        damages = self.files.damages(shard for _, shard, _ in entries)
        for file, damage in damages.items():
            self._forget(file, damage)
        return [(shard, keys) for _, shard, keys in entries if shard.file not in damages]

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
        self.files.write_shard(shard, data)
        index = IndexEntry(shard=shard, keys=tuple(sorted(samples))).model_dump_json()
        entry = f"{INDEX}/{namespace}/{digest}.json"
        self.files.write(entry, index.encode())
        self._claims.add(entry)
        self.renew_claims()
        return shard

    def shapes(self, shards: Iterable[ShardEntry]) -> dict[str, tuple[int | None, ...]]:
        """Name → shape of the tensors that each sample of ``shards`` has, from the files' headers.

        An axis whose size is not the same in all samples is ``None``.
        """
        seen: dict[str, set[tuple[int, ...]]] = defaultdict(set)
        for found in self._each(self._shapes, list(shards)):
            for name, shapes in found.items():
                seen[name] |= shapes
        return {
            name: tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*seen[name], strict=True))
            for name in sorted(seen)
        }

    def entries(self, namespace: str = "") -> list[Stored]:
        """The index entries of ``namespace``, or of all namespaces."""
        found = self.files.listing(f"{INDEX}/{namespace}".rstrip("/"))
        return [entry for entry in found if entry.file.endswith(".json") and not entry.file.startswith(".")]

    def read_entry(self, entry: Stored) -> IndexEntry | None:
        """An index entry; ``None`` when it cannot be read or was removed since it was listed."""
        data = self.files.read(entry.name)
        try:
            return None if data is None else IndexEntry.model_validate_json(data)
        except ValidationError as problem:
            logger.warning(
                "index entry %s/%s is damaged, its samples are encoded again: %s", self.place, entry.name, problem
            )
            return None

    def shards_of(self, entries: Sequence[Stored]) -> list[ShardEntry]:
        """The shards that ``entries`` tell of; an entry that cannot be read is left out."""

        def shard(entry: Stored) -> ShardEntry | None:
            index = self.read_entry(entry)
            return None if index is None else index.shard

        return [found for found in self._each(shard, entries) if found is not None]

    def claim(self, shards: Iterable[ShardEntry]) -> None:
        """Say that a step needs ``shards`` from now on; no effect where the store is for reading only."""
        files = {shard.file for shard in shards}
        self._claim(entry for entry in self.entries() if entry.shard in files)

    def renew_claims(self) -> None:
        """Say it again if the last time was long ago; for work that takes days."""
        if time.monotonic() - self._renewed > RENEWAL_SECONDS:
            self._renewed = time.monotonic()
            self.files.claim(self._claims)

    def verify(self, *shards: ShardEntry) -> None:
        """Check that shards are there and, unless they are marked as sound, hash them.

        Raises:
            ArtifactError: Some are missing or damaged; names one, what is wrong and the steps to run again.
        """
        for file, damage in self.files.damages(shards).items():
            raise ArtifactError(f"shard {self.where(file)} {damage}; run cache_vae and cache_text_embeds again")

    def verify_bytes(self, file: str) -> None:
        """Hash the shard called ``file``. A damaged one is forgotten; the next cache step encodes its samples again.

        Raises:
            DamagedShardError: It is missing or damaged.
        """
        if damage := self.files.damaged_bytes(file):
            raise self._lost(file, damage)

    def lease(self, file: str) -> Lease:
        """The shard called ``file`` on this machine, hashed once in the life of this object.

        A damaged one is forgotten, so that the next cache step encodes its samples again.

        Raises:
            DamagedShardError: It is missing or damaged.
        """
        try:
            return self.files.lease(file)
        except DamagedError as damage:
            raise self._lost(file, str(damage)) from damage

    def where(self, file: str) -> str:
        """What to call the shard ``file`` in messages."""
        return f"{self.place}/{SHARDS}/{file}"

    def _claim(self, entries: Iterable[Stored]) -> None:
        entries = list(entries)
        self._claims |= {entry.name for entry in entries}
        fresh = time.time() - FRESH_SECONDS
        self.files.claim([entry.name for entry in entries if entry.touched < fresh])

    def _lost(self, file: str, damage: str) -> DamagedShardError:
        self._forget(file, damage)
        return DamagedShardError(f"shard {self.where(file)} {damage}; run the step that caches it again")

    def _forget(self, file: str, damage: str) -> None:
        """Remove the index entries of a shard, where the store can be written."""
        for entry in self.entries():
            if entry.shard == file and (index := self.read_entry(entry)) is not None:
                samples = len(index.keys)
                logger.warning("shard %s %s; its %d samples are encoded again", self.where(file), damage, samples)
                self.files.remove(entry)

    def _shapes(self, shard: ShardEntry) -> dict[str, set[tuple[int, ...]]]:
        """Name → shapes of one shard's tensors."""
        start = self.files.read_start(shard.file, HEADER_BYTES)
        length = 8 + int.from_bytes(start[:8], "little")
        if length > len(start):
            start = self.files.read_start(shard.file, length)
        header: dict[str, dict[str, list[int]]] = json.loads(start[8:length])
        found: dict[str, set[tuple[int, ...]]] = defaultdict(set)
        for tensor, about in header.items():
            if tensor != "__metadata__":
                found[tensor.partition(".")[2]].add(tuple(about["shape"]))
        return found

    def _each(self, call: Callable[[Argument], Result], items: Sequence[Argument]) -> list[Result]:
        if self.files.readers == 1:
            return [call(item) for item in items]
        with ThreadPoolExecutor(self.files.readers, "kubetuner-store") as pool:
            return list(pool.map(call, items))


def open_store(address: str) -> Store:
    """The store at ``gs://bucket/prefix`` or in a folder.

    Raises:
        ArtifactError: A bucket's address or the credentials cannot be used.
        InputError: It is an address of another kind, or a variable that describes the mirror on this machine is wrong.
    """
    if "://" in address and not address.startswith("gs://"):
        raise InputError(f"a store is a folder or gs://bucket/prefix, and {address} is neither; mount it as a folder")
    if not address.startswith("gs://"):
        return Store(Path(address))
    from kubetuner.store.bucket import Bucket
    from kubetuner.store.mirror import configured

    return Store(Bucket(address, *configured()))


def store_address(artifact_folder: Path) -> str:
    """What ``KUBETUNER_STORE`` says; without it, the artifact's own folder."""
    return os.environ.get(STORE_VARIABLE, "") or str(artifact_folder)


def require_store(kept: Collection[str]) -> None:
    """Refuse to train without a store where the latents of the datasets ``kept`` go to it.

    Raises:
        InputError: They would be lost with the folder of another step.
    """
    if kept and not os.environ.get(STORE_VARIABLE, ""):
        raise InputError(
            f"vae_cache_ondemand keeps what is encoded while training ({', '.join(kept)}) in the store, and "
            f"{STORE_VARIABLE} is not set; set it to a folder or gs://bucket/prefix, or use vae_cache_disable."
        )


def resolve_store(artifact_folder: Path) -> Store:
    """The store at :func:`store_address`."""
    return open_store(store_address(artifact_folder))
