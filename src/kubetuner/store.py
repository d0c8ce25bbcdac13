"""The content-addressed store of encoded samples: shards named by their bytes, found by sample key.

::

    <root>/shards/<sha256>.safetensors          tensors named "<key>.<name>"
    <root>/index/<namespace>/<sha256>.json      which keys the shard holds; written after the shard, by rename

A shard without an index entry is invisible, so a writer that is killed at any byte leaves nothing half-written behind.
Shards are never changed: new samples go to new shards.
"""

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from kubetuner.artifacts import Record, ShardEntry, sha256_of, write_atomically
from kubetuner.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

STORE_VARIABLE = "KUBETUNER_STORE"


class _Index(Record):
    """The index entry of one shard."""

    shard: ShardEntry
    keys: tuple[str, ...]


class Store:
    """A store in the folder ``root``; made on the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, file: str) -> Path:
        """Where the shard called ``file`` lies."""
        return self.root / "shards" / file

    def known(self, namespace: str) -> dict[str, ShardEntry]:
        """Sample key → shard, for every undamaged shard of ``namespace``.

        A shard whose size or checksum is wrong is named in the log and removed, so its samples are encoded again.
        """
        found: dict[str, ShardEntry] = {}
        for entry in sorted((self.root / "index" / namespace).glob("*.json")):
            index = self._read(entry)
            if index is None:
                entry.unlink(missing_ok=True)
                continue
            found.update(dict.fromkeys(index.keys, index.shard))
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
        staging.replace(self.path(shard.file))
        index = _Index(shard=shard, keys=tuple(sorted(samples))).model_dump_json()
        write_atomically(
            self.root / "index" / namespace / f"{digest}.json", lambda path: path.write_text(index, encoding="utf-8")
        )
        return shard

    def tensor_names(self, shard: ShardEntry) -> frozenset[str]:
        """Names of the tensors that each sample of ``shard`` has, from the file's header."""
        from safetensors import safe_open

        with safe_open(self.path(shard.file), framework="np") as file:
            return frozenset(key.partition(".")[2] for key in file.keys())  # noqa: SIM118

    def verify(self, shard: ShardEntry) -> None:
        """Check that a shard is there and undamaged.

        Raises:
            ArtifactError: It is not; names the file and the step to run again.
        """
        path = self.path(shard.file)
        if not path.is_file() or path.stat().st_size != shard.bytes or sha256_of(path) != shard.sha256:
            raise ArtifactError(f"shard {path} is missing or damaged; run cache_vae and cache_text_embeds again")

    def _read(self, entry: Path) -> _Index | None:
        try:
            index = _Index.model_validate_json(entry.read_bytes())
            self.verify(index.shard)
        except (ValidationError, ArtifactError) as problem:
            logger.warning("%s: its samples are encoded again: %s", entry.name, problem)
            return None
        return index


def resolve_store(artifact_folder: Path) -> Store:
    """The store named by ``KUBETUNER_STORE``; without it, the artifact's own folder."""
    configured = os.environ.get(STORE_VARIABLE, "")
    return Store(Path(configured) if configured else artifact_folder)
