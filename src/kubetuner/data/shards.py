"""Reading encoded samples: memory-mapped, in any order."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kubetuner.artifacts import ShardEntry
from kubetuner.errors import ArtifactError
from kubetuner.store import Store, open_store, store_address
from kubetuner.store.files import Lease


class ShardReader:
    """Maps shards of a store and reads tensors of single samples from them.

    A shard stays mapped, unless the store lies elsewhere and this machine has room for some of them only: then those
    used longest ago are given back.

    Attributes:
        wants_order: Whether reading is faster after :meth:`fetch_ahead`.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: OrderedDict[str, tuple[Any, Lease]] = OrderedDict()
        self._leased = 0
        self.wants_order = False

    def verify(self, shards: Sequence[ShardEntry]) -> None:
        """Claim every shard and check it; those marked as sound are hashed when they are first read.

        Raises:
            ArtifactError: A shard is missing or damaged.
        """
        self._store.claim(shards)
        self._store.verify(*shards)
        self.wants_order = not self._store.files.expect(shards)

    def fetch_ahead(self, batches: Sequence[Collection[str]]) -> None:
        """Say which shards the next batches read, the first of them now."""
        self._store.files.fetch_ahead(batches)

    def renew_claims(self) -> None:
        """See :meth:`~kubetuner.store.Store.renew_claims`."""
        self._store.renew_claims()

    def tensors(self, key: str, shard: str, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors ``names`` of the sample ``key``, copied out of the shard, in their stored dtype.

        Raises:
            ArtifactError: The shard is missing, damaged or does not hold the sample.
        """
        handle = self._handle(shard)
        try:
            # safetensors gives views into the mapped file; what is done to one would show in the next read.
            return {name: handle.get_tensor(f"{key}.{name}").clone() for name in names}
        except SafetensorError as error:
            raise ArtifactError(
                f"{self._store.where(shard)} holds no sample {key[:12]} ({error}); run the caches again"
            ) from error

    def _handle(self, shard: str) -> Any:
        if shard not in self._open:
            lease = self._store.lease(shard)
            self._open[shard] = (safe_open(lease.path, framework="pt"), lease)
            self._leased += lease.size
            self._give_back()
        self._open.move_to_end(shard)
        return self._open[shard][0]

    def _give_back(self) -> None:
        while self._leased > self._store.files.leased_bytes and len(self._open) > 1:
            _, (_, lease) = self._open.popitem(last=False)
            lease.release()
            self._leased -= lease.size


class CachedShards:
    """The shards of several artifacts, read from the stores they lie in; artifacts of one store share a reader."""

    def __init__(self) -> None:
        self._readers: dict[str, ShardReader] = {}
        self._entries: dict[str, dict[str, ShardEntry]] = {}
        self._places: dict[str, str] = {}

    def add(self, folder: Path, shards: Sequence[ShardEntry]) -> None:
        """Add the ``shards`` that the artifact in ``folder`` refers to."""
        address = store_address(folder)
        if address not in self._readers:
            self._readers[address] = ShardReader(open_store(address))
        self._entries.setdefault(address, {}).update((shard.file, shard) for shard in shards)
        self._places.update((shard.file, address) for shard in shards)

    def verify(self, wanted: Collection[str] | None = None) -> None:
        """Claim and check the shards ``wanted`` (default: all); see :meth:`ShardReader.verify`.

        Raises:
            ArtifactError: A shard is missing or damaged.
        """
        for address, reader in self._readers.items():
            entries = self._entries[address].values()
            reader.verify([entry for entry in entries if wanted is None or entry.file in wanted])

    def tensors(self, key: str, shard: str, names: Sequence[str]) -> dict[str, Tensor]:
        """See :meth:`ShardReader.tensors`."""
        return self._readers[self._places[shard]].tensors(key, shard, names)

    @property
    def wants_order(self) -> bool:
        """Whether reading is faster after :meth:`fetch_ahead`."""
        return any(reader.wants_order for reader in self._readers.values())

    def fetch_ahead(self, batches: Sequence[Collection[str]]) -> None:
        """See :meth:`ShardReader.fetch_ahead`."""
        for address, reader in self._readers.items():
            reader.fetch_ahead([[file for file in batch if self._places[file] == address] for batch in batches])

    def renew_claims(self) -> None:
        """Keep the shards from being collected as garbage while work takes days."""
        for reader in self._readers.values():
            reader.renew_claims()
