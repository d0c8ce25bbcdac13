"""Latents that training puts into the store, and takes from it."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from kubetuner.data.keys import SAMPLES_PER_SHARD, Keys
from kubetuner.data.shards import ShardReader
from kubetuner.store import Store


class KeptLatents:
    """Those with some keys, in one namespace of a store.

    They are written in whole shards, so what a kill loses is less than a shard. Of several processes each writes its
    own; what one encodes that another has in an unfinished shard is the same, and is in the store twice.

    Args:
        store: Where they are.
        namespace: Of what encodes them.
        names: Their tensors.
        keys: Of those that are wanted.
    """

    def __init__(self, store: Store, namespace: str, names: Sequence[str], keys: Iterable[str]) -> None:
        self._store, self._namespace, self._names = store, namespace, names
        self._reader = ShardReader(store)
        self._keys = Keys((place, key, 0) for place, key in enumerate(keys))
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self.look()

    def look(self) -> None:
        """Find what earlier runs and other processes have written."""
        if not len(self._keys.missing()):
            return
        found = self._store.find(self._namespace, self._keys.lacking)
        for shard, numbers in found:
            self._keys.put(numbers, shard)
        if found:
            self._reader.verify([shard for shard, _ in found])

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or self._keys.find(key) is not None

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """The tensors of one that is there.

        Raises:
            ArtifactError: Its shard is missing or damaged.
        """
        if key in self._waiting:
            return self._waiting[key]
        shard = self._keys.find(key)
        if shard is None:
            raise KeyError(key)
        return self._reader.tensors(key, shard.file, self._names)

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Put one into the store, with the shard that it completes."""
        if key not in self:
            self._waiting[key] = dict(tensors)
        if len(self._waiting) >= SAMPLES_PER_SHARD:
            self.write()

    def write(self) -> None:
        """Write what waits for its shard to be full."""
        if self._waiting:
            shard = self._store.write_shard(self._namespace, self._waiting)
            self._keys.put(self._keys.numbers(self._waiting), shard)
            self._waiting = {}

    def fetch_ahead(self, batches: Sequence[Sequence[str]]) -> None:
        """Say which keys the next batches read, where reading in order pays off."""
        if self._reader.wants_order:
            shards = ([self._keys.find(key) for key in batch] for batch in batches)
            self._reader.fetch_ahead([{shard.file for shard in batch if shard is not None} for batch in shards])

    def renew_claims(self) -> None:
        """See :meth:`~kubetuner.store.Store.renew_claims`."""
        self._store.renew_claims()
