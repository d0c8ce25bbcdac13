"""The ``cache_vae`` step: pictures of a dataset artifact in, VAE latents out."""

import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from kubetuner.artifacts import (
    ARTIFACT_FILE,
    LATENTS_FILE,
    SAMPLES_FILE,
    LatentRow,
    LatentsArtifact,
    OnDemand,
    Sample,
    ShardEntry,
    Skipped,
    TensorSpec,
    describe_file,
    write_artifact,
    write_rows,
)
from kubetuner.config.sections.steps import CacheVaeSection
from kubetuner.data.geometry import LeftOut, Placement, place
from kubetuner.data.keys import SAMPLES_PER_SHARD, Keys
from kubetuner.data.pictures import NOT_FINITE, decoding_threads, read_pixels
from kubetuner.data.rows import RowFile
from kubetuner.data.shard_writer import ShardWriter
from kubetuner.digests import fingerprint, fingerprinting
from kubetuner.imports import importing
from kubetuner.progress import Progress
from kubetuner.steps.allocation import keep_freed_memory, share_freed_memory
from kubetuner.steps.cache_masks import CachedMasks, cache_masks
from kubetuner.steps.download_dataset import read_dataset
from kubetuner.store import Store, require_store, resolve_store
from kubetuner.threads import in_threads, limit_threads

if TYPE_CHECKING:
    from torch import Tensor

    from kubetuner.families.encoding import Batch

logger = logging.getLogger(__name__)

# Decoded pictures that wait, for each thread that decodes; a megapixel takes 3 MB.
DECODED_AHEAD = 2


@dataclass(frozen=True)
class _Placed:
    """A sample with its geometry and content key."""

    sample: Sample
    placement: Placement
    key: str


def cache_vae(
    section: CacheVaeSection, dataset: Path, out: Path, *, shard: int = 0, num_shards: int = 1
) -> LatentsArtifact:
    """Encode the samples ``shard``, ``shard + num_shards``, … of ``dataset`` that the store does not know yet.

    A latent's key is made of the picture's bytes, its geometry, the encoder, the dtype and the seed (not for moments,
    which are not drawn); its posterior noise is drawn from that key, and batches are always full
    (:class:`~kubetuner.families.encoding.Encoder`). So neither other pictures nor the number of shards change a bit.

    Pictures of datasets whose latents are made while training are placed and not encoded: their rows name no shard.

    Raises:
        ArtifactError: ``dataset`` is incomplete or damaged.
        InputError: Latents are to be kept while training (``vae_cache_ondemand``), and there is no store to keep them.
    """
    from kubetuner.tracking import track

    kept = [entry.id for entry in section.datasets if entry.vae_cache == "ondemand"]
    require_store(kept)

    (out / ARTIFACT_FILE).unlink(missing_ok=True)
    with track("cache_vae", {"model_family": section.model.family, "shard": f"{shard} of {num_shards}"}) as run:
        artifact = _cache(section, dataset, out, (shard, num_shards))
        run.log_metrics({"encoded": artifact.encoded, "reused": artifact.reused}, 0)
    write_artifact(out, artifact)
    return artifact


def _cache(section: CacheVaeSection, dataset: Path, out: Path, part: tuple[int, int]) -> LatentsArtifact:
    source = read_dataset(dataset)
    store = resolve_store(out)
    kind = "moments" if section.vae_cache_moments else "latents"
    namespace = f"{kind}-{fingerprint(section.model.vae_identity(), section.dtype)[:16]}"
    samples = _Samples(section, dataset, *part)
    for entry, numbers in store.find(namespace, samples.keys.numbers):
        samples.keys.put(numbers, entry)
    encoded = _encode(section, store, namespace, samples, dataset)
    masks = cache_masks(section, store, dataset, samples.masked)
    skipped, left = samples.left_out.copy(), samples.online
    out.mkdir(parents=True, exist_ok=True)
    count = write_rows(out, LATENTS_FILE, _rows(samples, masks, skipped))
    skips = tuple(skipped[position] for position in sorted(skipped))
    for skip in skips:
        logger.warning("skipped %s: %s", skip.name, skip.reason)
    said = f", {left} left to training" if left else ""
    logger.info("latents: %d reused, %d encoded, %d skipped%s", count - left - encoded, encoded, len(skips), said)
    shards = samples.keys.shards()
    tensors = {name: TensorSpec(dtype=section.dtype, shape=shape) for name, shape in store.shapes(shards).items()}
    return LatentsArtifact(
        fingerprint=fingerprint(section.deciding(), source.fingerprint, part),
        part=part,
        parents=(source.fingerprint,),
        files=(describe_file(out, LATENTS_FILE),),
        num_samples=count,
        encoded=encoded,
        reused=count - left - encoded,
        left=left,
        on_demand=_on_demand(section, namespace) if left else None,
        tensors=tensors | masks.tensors(),
        shards=(*shards, *masks.shards()),
        skipped=skips,
    )


def _on_demand(section: CacheVaeSection, namespace: str) -> OnDemand:
    return OnDemand(
        namespace=namespace,
        dtype=section.dtype,
        batch_size=section.vae_batch_size,
        moments=section.vae_cache_moments,
        kept=tuple(entry.id for entry in section.datasets if entry.vae_cache == "ondemand"),
    )


class _Samples:
    """The samples ``shard``, ``shard + num_shards``, … of a dataset, by position in it; they stay on disk.

    Attributes:
        keys: Content keys of those that are to be encoded here; those of one target size have one rank.
        left_out: Those that a limit leaves out, by position in the dataset.
    """

    def __init__(self, section: CacheVaeSection, dataset: Path, shard: int, num_shards: int) -> None:
        self._section = section
        self._geometries = {entry.id: entry.geometry for entry in section.datasets}
        self._made_online = {entry.id for entry in section.datasets if entry.vae_cache != "ahead"}
        self._disabled = {entry.id for entry in section.datasets if entry.vae_cache == "disabled"}
        encoder = section.model.vae_identity(), section.dtype
        self._drawn_key, self._moments_key = (fingerprinting(*encoder, last) for last in (section.seed, "moments"))
        self._rows = RowFile(Sample)
        self._masked = array("I")
        self._online = array("I")
        self.left_out: dict[int, Skipped] = {}
        mine = (
            (position, sample)
            for position, sample in self._rows.add(dataset / SAMPLES_FILE)
            if position % num_shards == shard and sample.dataset in self._geometries
        )
        self.keys = Keys(self._add(mine))

    def _add(self, samples: Iterable[tuple[int, Sample]]) -> Iterator[tuple[int, str, int]]:
        """Take in samples by their position in the dataset; yields those that are to be encoded here for ``keys``."""
        for position, sample in samples:
            placement = self._place(sample)
            if isinstance(placement, LeftOut):
                self.left_out[position] = Skipped(name=sample.id, reason=placement.reason)
                continue
            if sample.mask:
                self._masked.append(position)
            if sample.dataset in self._made_online:
                self._online.append(position)
                continue
            width, height = placement.target_size
            yield position, self._key(sample, placement), width << 32 | height

    def _key(self, sample: Sample, placement: Placement) -> str:
        moments = self._section.vae_cache_moments or sample.dataset in self._disabled
        key = self._moments_key if moments else self._drawn_key
        return key(sample.sha256, placement.intermediary_size, placement.crop, placement.target_size)

    def _place(self, sample: Sample) -> Placement | LeftOut:
        name = sample.id.removeprefix(f"{sample.dataset}/")
        key = f"{self._section.seed}:{sample.sha256}"
        return place(self._geometries[sample.dataset], sample.width, sample.height, key, name)

    def __getitem__(self, position: int) -> _Placed:
        return self._placed(position, self.keys[position])

    def _placed(self, position: int, key: str = "") -> _Placed:
        sample = self._rows[position]
        placement = self._place(sample)
        assert isinstance(placement, Placement)  # It was one when the sample was taken in.
        return _Placed(sample, placement, key or self._key(sample, placement))

    @property
    def online(self) -> int:
        """How many are left for training to encode."""
        return len(self._online)

    def left(self) -> Iterator[_Placed]:
        """Those that are left for training to encode."""
        return (self._placed(position) for position in self._online)

    def masked(self) -> Iterator[_Placed]:
        """Those with a mask."""
        return (self._placed(position) for position in self._masked)

    def placed(self) -> Iterator[tuple[int, _Placed, ShardEntry | None]]:
        """Position, sample and shard of those that are to be encoded here."""
        return ((position, self._placed(position, key), shard) for position, key, shard in self.keys.placed())


def _rows(samples: _Samples, masks: CachedMasks, skipped: dict[int, Skipped]) -> Iterator[LatentRow]:
    """The rows of the samples; those that cannot be encoded are added to ``skipped`` by position in the dataset."""
    for position, item, shard in samples.placed():
        if shard is None:
            skipped[position] = Skipped(name=item.sample.id, reason=NOT_FINITE)
        else:
            yield _row(item, shard.file, masks.of(item))
    for item in samples.left():
        yield _row(item, "", masks.of(item), item.sample.file)


def _encode(section: CacheVaeSection, store: Store, namespace: str, samples: _Samples, dataset: Path) -> int:
    """Encode the missing samples and note their shards; returns how many have finite latents."""
    missing = samples.keys.missing()
    if not len(missing):
        return 0
    with importing():
        import diffusers.models.autoencoders  # noqa: F401 - the VAE is in there, and is loaded soon
        import torch

        from kubetuner.families.encoding import load_encoder

    keep_freed_memory()
    share_freed_memory()
    limit_threads()
    encoder = load_encoder(section.model, section.dtype, section.vae_batch_size)
    with (
        Progress("cache_vae", len(missing), "pictures") as progress,
        ShardWriter(store, namespace, samples.keys, SAMPLES_PER_SHARD) as shards,
        torch.inference_mode(),
    ):
        batches = _batches(_decoded(dataset, samples, missing), section.vae_batch_size)
        for key, tensors in encoder.encode_all(batches, moments=section.vae_cache_moments):
            if tensors is not None:
                shards.add(key, tensors)
            progress.advance(1)
    return shards.added


def _batches(pictures: "Iterator[tuple[_Placed, Tensor]]", size: int) -> "Iterator[Batch]":
    """Keys and pixels of neighbours of one target size, at most ``size`` together."""
    for _, same in groupby(pictures, key=lambda picture: picture[0].placement.target_size):
        while batch := list(islice(same, size)):
            yield [item.key for item, _ in batch], [pixels for _, pixels in batch]


def _decoded(dataset: Path, samples: _Samples, positions: Iterable[int]) -> "Iterator[tuple[_Placed, Tensor]]":
    """The samples at ``positions`` with their pixels (uint8), in order; threads prepare those that follow."""

    def decode(position: int) -> "tuple[_Placed, Tensor]":
        item = samples[position]
        # As text: of the parts of path objects Python keeps a table, which grows with their number.
        path = os.path.join(dataset, item.sample.file)
        return item, read_pixels(path, item.sample.sha256, item.sample.id, item.placement)

    return in_threads(decode, positions, decoding_threads(), "cache_vae", ahead=DECODED_AHEAD)


def _row(item: _Placed, shard: str, mask: Mapping[str, str], picture: str = "") -> LatentRow:
    return LatentRow(
        sample=item.sample.id,
        dataset=item.sample.dataset,
        key=item.key,
        shard=shard,
        intermediary_size=item.placement.intermediary_size,
        crop=item.placement.crop,
        target_size=item.placement.target_size,
        bucket=item.placement.bucket,
        picture=picture,
        **mask,
    )
