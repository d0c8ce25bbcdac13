"""Reading encoded samples: memory-mapped, in any order."""

from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kubetuner.artifacts import ShardEntry
from kubetuner.errors import ArtifactError
from kubetuner.store import Store


class ShardReader:
    """Opens each shard of a store once and reads tensors of single samples from it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: dict[str, Any] = {}

    def verify(self, shards: Sequence[ShardEntry]) -> None:
        """Claim every shard and check it; those dated as sound are hashed when they are first read.

        Raises:
            ArtifactError: A shard is missing or damaged.
        """
        self._store.claim(shards)
        for shard in shards:
            self._store.verify(shard)

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
                f"{self._store.path(shard)} holds no sample {key[:12]} ({error}); run the caches again"
            ) from error

    def _handle(self, shard: str) -> Any:
        if shard not in self._open:
            self._store.verify_bytes(shard)
            self._open[shard] = safe_open(self._store.path(shard), framework="pt")
        return self._open[shard]
