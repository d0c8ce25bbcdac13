"""Writing shards while the samples of the next are being encoded."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

from kubetuner.artifacts import ShardEntry
from kubetuner.data.keys import Keys
from kubetuner.store import Store

if TYPE_CHECKING:
    from torch import Tensor

# Of 300 tokens of T5-XXL there are a hundred in that. What is gathered, what is written and its bytes are in memory.
MAX_SHARD_BYTES = 256 << 20


class ShardWriter:
    """Gathers samples into shards and writes each on a thread, one at a time; the last on leaving the context.

    So an encoder waits neither for a checksum nor for a disk or a bucket, unless these take longer than the next
    shard's samples do. An exception leaves what is gathered unwritten: a shard that is begun is not worth its file.

    Args:
        store: Where they go.
        namespace: Of what encodes them.
        keys: Of all samples; each written shard is noted there.
        size: Samples of a shard, if they have no more than :data:`MAX_SHARD_BYTES`. A kill loses no more than two.

    Attributes:
        added: Samples so far.
    """

    def __init__(self, store: Store, namespace: str, keys: Keys, size: int) -> None:
        self._store, self._namespace, self._keys, self._size = store, namespace, keys, size
        self._gathered: dict[str, Mapping[str, Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kubetuner-shards")
        self._writing: tuple[tuple[str, ...], Future[ShardEntry]] | None = None
        self._bytes = 0
        self.added = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def add(self, key: str, tensors: "Mapping[str, Tensor]") -> None:
        """Add a sample: name → contiguous CPU tensor.

        Raises:
            ArtifactError, OSError: An earlier shard could not be written.
        """
        self._gathered[key] = tensors
        self.added += 1
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if len(self._gathered) >= self._size or self._bytes >= MAX_SHARD_BYTES:
            self._write()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._write()
                self._note()
        finally:
            self._thread.shutdown()

    def _write(self) -> None:
        self._note()
        if self._gathered:
            samples, self._gathered, self._bytes = self._gathered, {}, 0
            self._writing = tuple(samples), self._thread.submit(self._store.write_shard, self._namespace, samples)

    def _note(self) -> None:
        """Wait for the shard that is being written, and note what is in it."""
        if self._writing is not None:
            keys, written = self._writing
            self._writing = None
            self._keys.put(self._keys.numbers(keys), written.result())
