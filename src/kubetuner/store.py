"""The content-addressed store of encoded samples: shards named by their bytes, found by sample key.

::

    <root>/shards/<sha256>.safetensors          tensors named "<key>.<name>"
    <root>/index/<namespace>/<sha256>.json      which keys the shard holds; written after the shard, by rename

A shard without an index entry is invisible, so of a writer that is killed at any byte nothing half-written is seen; at
most a ``.tmp`` file stays behind. Shards are never changed: new samples go to new shards.
"""

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
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

        A shard whose size or checksum is wrong is named in the log and its index entry removed, so that its samples
        are encoded again. The file stays: another process may be putting an undamaged one in its place.
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
        write_atomically(self.path(shard.file), lambda path: path.write_bytes(data))
        index = _Index(shard=shard, keys=tuple(sorted(samples))).model_dump_json()
        write_atomically(
            self.root / "index" / namespace / f"{digest}.json", lambda path: path.write_text(index, encoding="utf-8")
        )
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

    def verify(self, shard: ShardEntry) -> None:
        """Check that a shard is there and undamaged.

        Raises:
            ArtifactError: It is not; names the file, what is wrong with it and the steps to run again.
        """
        if damage := self._damage(shard):
            raise ArtifactError(f"shard {self.path(shard.file)} {damage}; run cache_vae and cache_text_embeds again")

    def _damage(self, shard: ShardEntry) -> str:
        """What is wrong with a shard, or nothing."""
        path = self.path(shard.file)
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != shard.bytes:
            return f"is damaged: it has {path.stat().st_size} bytes, expected {shard.bytes}"
        return "" if sha256_of(path) == shard.sha256 else "is damaged: its bytes do not have the checksum in its name"

    def _read(self, entry: Path) -> _Index | None:
        try:
            index = _Index.model_validate_json(entry.read_bytes())
        except FileNotFoundError:  # Another process found its shard damaged first.
            return None
        except ValidationError as problem:
            logger.warning("index entry %s is damaged, its samples are encoded again: %s", entry, problem)
            return None
        if damage := self._damage(index.shard):
            path = self.path(index.shard.file)
            logger.warning("shard %s %s; its %d samples are encoded again", path, damage, index.shard.samples)
            return None
        return index


def resolve_store(artifact_folder: Path) -> Store:
    """The store named by ``KUBETUNER_STORE``; without it, the artifact's own folder."""
    configured = os.environ.get(STORE_VARIABLE, "")
    return Store(Path(configured) if configured else artifact_folder)
