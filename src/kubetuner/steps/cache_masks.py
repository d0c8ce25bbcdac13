"""The part of ``cache_vae`` that keeps masks: cut like their pictures, at the size of latents, under keys of their own.

A key is made of the mask's bytes and the geometry. So a mask that changes costs itself and no encoding, and a picture
that changes leaves its mask as it is.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kubetuner.artifacts import Sample, ShardEntry, TensorSpec
from kubetuner.config.sections.steps import CacheVaeSection
from kubetuner.data.geometry import Placement
from kubetuner.data.keys import Keys
from kubetuner.data.masks import WEIGHTS, to_weights
from kubetuner.data.shard_writer import ShardWriter
from kubetuner.digests import fingerprint
from kubetuner.errors import ArtifactError
from kubetuner.steps.planning.costs import vae_shape
from kubetuner.store import Store
from kubetuner.threads import available_cpus, in_threads

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

NAMESPACE = "masks"
MASKS_PER_SHARD = 1024
DTYPE = "fp16"


class Placed(Protocol):
    """A sample and where it goes."""

    @property
    def sample(self) -> Sample:
        """The sample."""
        ...

    @property
    def placement(self) -> Placement:
        """Its picture's geometry, which is its mask's too."""
        ...


@dataclass(frozen=True)
class CachedMasks:
    """Where the masks of some samples are.

    Attributes:
        factor: Pixels per latent along an edge.
        keys: Of the samples' masks, with the shard of each.
        shape: Of every mask's tensor, ``None`` along an axis that varies; empty without masks.
    """

    factor: int
    keys: Keys
    shape: tuple[int | None, ...]

    def of(self, item: Placed) -> dict[str, str]:
        """The fields of a sample's row that say where its mask is."""
        if not item.sample.mask:
            return {}
        key = _key(item, self.factor)
        shard = self.keys.find(key)
        assert shard is not None  # It was found or has been made.
        return {"mask": key, "mask_shard": shard.file}

    def shards(self) -> tuple[ShardEntry, ...]:
        """All shards, by name."""
        return self.keys.shards()

    def tensors(self) -> dict[str, TensorSpec]:
        """What a mask's tensor looks like."""
        return {WEIGHTS: TensorSpec(dtype=DTYPE, shape=self.shape)} if len(self.keys) else {}


def cache_masks(
    section: CacheVaeSection, store: Store, dataset: Path, samples: Callable[[], Iterable[Placed]]
) -> CachedMasks:
    """Put the masks of ``samples()`` that ``store`` does not know yet into it.

    Args:
        section: Names the model.
        store: Where latents go too.
        dataset: Folder of the dataset artifact.
        samples: Yields those with a mask; asked twice for the same, so that memory holds packed keys alone.

    Raises:
        ArtifactError: A mask's file is missing or damaged.
    """
    factor, _ = vae_shape(section.model)
    keys = Keys((place, _key(item, factor), 0) for place, item in enumerate(samples()))
    if not len(keys):
        return CachedMasks(factor, keys, ())
    for shard, numbers in store.find(NAMESPACE, keys.numbers):
        keys.put(numbers, shard)
    missing = keys.missing()
    first = bytearray(len(keys))
    for place in missing:
        first[place] = True
    made = in_threads(
        lambda item: (_key(item, factor), _weights(dataset, item, factor)),
        compress(samples(), first),
        available_cpus(),
        "masks",
    )
    with ShardWriter(store, NAMESPACE, keys, MASKS_PER_SHARD) as shards:
        for key, weights in made:
            shards.add(key, {WEIGHTS: weights})
    logger.info("masks: %d reused, %d made", keys.distinct - len(missing), len(missing))
    return CachedMasks(factor, keys, store.shapes(keys.shards())[WEIGHTS])


def _key(item: Placed, factor: int) -> str:
    where, sample = item.placement, item.sample
    geometry = (where.intermediary_size, where.crop, where.target_size)
    return fingerprint(WEIGHTS, Path(sample.mask).stem, sample.mask_kind, *geometry, factor)


def _weights(dataset: Path, item: Placed, factor: int) -> "Tensor":
    path, sample = dataset / item.sample.mask, item.sample
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != path.stem:
        raise ArtifactError(f"{path}, the mask of {sample.id}, is missing or damaged; run download_dataset again")
    weights = to_weights(data, sample.mask_kind, item.placement, factor)
    if not weights.any():
        logger.warning("%s: its mask is black all over the crop; nothing is learned from the picture", sample.id)
    return weights
