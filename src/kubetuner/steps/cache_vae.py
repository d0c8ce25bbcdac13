"""The ``cache_vae`` step: pictures of a dataset artifact in, VAE latents out."""

import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    Sample,
    ShardEntry,
    Skipped,
    TensorSpec,
    describe_file,
    fingerprint,
    read_rows,
    write_artifact,
    write_rows,
)
from kubetuner.config.sections import CacheVaeSection
from kubetuner.data.geometry import LeftOut, Placement, Size, place
from kubetuner.data.pictures import decode_picture, to_bytes, to_floats
from kubetuner.errors import ArtifactError
from kubetuner.progress import Progress
from kubetuner.steps.download_dataset import read_dataset
from kubetuner.store import Store, resolve_store

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kubetuner.families.base import Family

logger = logging.getLogger(__name__)

# A shard is written, and so survives a kill, after this many encoded samples.
SAMPLES_PER_SHARD = 256
MAX_THREADS = 8
NOT_FINITE = "the VAE gave latents that are not finite; remove the picture, or choose another VAE if there are many"


_Part = tuple[CacheVaeSection, Path, int, int]


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
    which are not drawn); its posterior noise is drawn from that key, and batches are always full (:func:`_encode`). So
    neither other pictures nor the number of shards change a bit of it.

    Raises:
        ArtifactError: ``dataset`` is incomplete or damaged.
    """
    from kubetuner.tracking import track

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
    # The samples are read several times, so that however many there are, only their keys are held in memory.
    samples = (section, dataset, *part)
    sizes = {item.key: item.placement.target_size for item in _place_all(*samples) if isinstance(item, _Placed)}
    known = store.known(namespace, sizes.keys())
    missing = {key: size for key, size in sizes.items() if key not in known}
    written = _encode(section, store, namespace, len(missing), _read_ahead(dataset, _by_size(samples, missing)))
    known |= written
    skipped: list[Skipped] = []
    out.mkdir(parents=True, exist_ok=True)
    count = write_rows(out, LATENTS_FILE, _rows(_place_all(*samples), known, skipped))
    for skip in skipped:
        logger.warning("skipped %s: %s", skip.name, skip.reason)
    logger.info("latents: %d reused, %d encoded, %d skipped", count - len(written), len(written), len(skipped))
    shards = {entry.file: entry for entry in known.values()}
    shapes = store.shapes(shards.values())
    return LatentsArtifact(
        fingerprint=fingerprint(section.deciding(), source.fingerprint, part),
        parents=(source.fingerprint,),
        files=(describe_file(out, LATENTS_FILE),),
        num_samples=count,
        encoded=len(written),
        reused=count - len(written),
        tensors={name: TensorSpec(dtype=section.dtype, shape=shape) for name, shape in shapes.items()},
        shards=tuple(shards[file] for file in sorted(shards)),
        skipped=tuple(skipped),
    )


def _place_all(section: CacheVaeSection, dataset: Path, shard: int, num_shards: int) -> Iterator[_Placed | Skipped]:
    """The geometry and key of each of this shard's samples; samples that its limits leave out are skipped."""
    geometries = {entry.id: entry.geometry for entry in section.datasets}
    identity = section.model.vae_identity()
    for index, sample in enumerate(read_rows(dataset, SAMPLES_FILE, Sample)):
        if index % num_shards != shard or sample.dataset not in geometries:
            continue
        geometry = geometries[sample.dataset]
        name = sample.id.removeprefix(f"{sample.dataset}/")
        placement = place(geometry, sample.width, sample.height, f"{section.seed}:{sample.sha256}", name)
        if isinstance(placement, LeftOut):
            yield Skipped(name=sample.id, reason=placement.reason)
            continue
        key = fingerprint(
            sample.sha256, placement.intermediary_size, placement.crop, placement.target_size,
            identity, section.dtype, "moments" if section.vae_cache_moments else section.seed,
        )  # fmt: skip
        yield _Placed(sample, placement, key)


def _rows(
    items: Iterable[_Placed | Skipped], known: Mapping[str, ShardEntry], skipped: list[Skipped]
) -> Iterator[LatentRow]:
    """The rows of the items that are encoded; the others are appended to ``skipped``."""
    for item in items:
        if isinstance(item, Skipped):
            skipped.append(item)
        elif item.key in known:
            yield _row(item, known[item.key])
        else:
            skipped.append(Skipped(name=item.sample.id, reason=NOT_FINITE))


def _by_size(samples: _Part, missing: Mapping[str, Size]) -> Iterator[_Placed]:
    """The first item with each key of ``missing``, those of one target size together."""
    for size in sorted(set(missing.values())):
        left = {key for key, its in missing.items() if its == size}
        for item in _place_all(*samples):
            if isinstance(item, _Placed) and item.key in left:
                left.remove(item.key)
                yield item


def _encode(
    section: CacheVaeSection,
    store: Store,
    namespace: str,
    total: int,
    pictures: "Iterator[tuple[_Placed, Tensor]]",
) -> dict[str, ShardEntry]:
    """Encode ``pictures``; returns key → the shard written, without samples whose latents are not finite.

    Kernels are chosen by the shape of a whole batch, so the last bits of a picture's latents depend on how many are
    encoded together, though not on which. Therefore every batch is filled up to ``vae_batch_size``.
    """
    if not total:
        return {}
    import torch

    from kubetuner.families import load_family
    from kubetuner.families.loading import default_device

    device = default_device()
    family = load_family(section.model.family)
    vae = family.load_vae(section.model, device)
    dtype = torch.bfloat16 if section.dtype == "bf16" else torch.float32
    written: dict[str, ShardEntry] = {}
    ready: dict[str, dict[str, Tensor]] = {}
    with Progress("cache_vae", total, "pictures") as progress, torch.inference_mode():
        for batch in _batches(pictures, section.vae_batch_size):
            encoded = {name: one.to(dtype).cpu() for name, one in _encode_batch(section, family, vae, batch).items()}
            finite = torch.stack([one.isfinite().flatten(1).all(1) for one in encoded.values()]).all(0).tolist()
            for place, (item, _) in enumerate(batch):
                if finite[place]:
                    ready[item.key] = {name: tensor[place] for name, tensor in encoded.items()}
            if len(ready) >= SAMPLES_PER_SHARD:
                written |= dict.fromkeys(ready, store.write_shard(namespace, ready))
                ready = {}
            progress.advance(len(batch))
    if ready:
        written |= dict.fromkeys(ready, store.write_shard(namespace, ready))
    return written


def _batches(pictures: "Iterator[tuple[_Placed, Tensor]]", size: int) -> "Iterator[list[tuple[_Placed, Tensor]]]":
    """Neighbours of one target size, at most ``size`` together."""
    for _, same in groupby(pictures, key=lambda picture: picture[0].placement.target_size):
        while batch := list(islice(same, size)):
            yield batch


def _encode_batch(
    section: CacheVaeSection, family: "Family", vae: "nn.Module", batch: "Sequence[tuple[_Placed, Tensor]]"
) -> "dict[str, Tensor]":
    """What the cache keeps, on the VAE's device; the batch is filled up with its last picture."""
    import torch

    from kubetuner.data.latents import MOMENTS, SAMPLE, key_generator

    device = next(vae.parameters()).device
    full = [*batch, *[batch[-1]] * (section.vae_batch_size - len(batch))]
    # Whole bytes travel: a quarter of what floats would be.
    pixels = to_floats(torch.stack([one for _, one in full]).to(device))
    if section.vae_cache_moments:
        return dict(zip(MOMENTS, family.encode_moments(vae, pixels), strict=True))
    shape = family.latent_shape(vae, pixels.shape[2], pixels.shape[3])
    noise = torch.stack([torch.randn(shape, generator=key_generator(item.key)) for item, _ in full])
    return {SAMPLE[0]: family.encode_pixels(vae, pixels, noise.to(device))}


def _read_ahead(dataset: Path, items: Iterable[_Placed]) -> "Iterator[tuple[_Placed, Tensor]]":
    """Each item with its pixels (uint8), in order; meanwhile threads prepare those that follow."""
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="cache_vae")
    waiting: deque[tuple[_Placed, Future[Tensor]]] = deque()
    try:
        for following in items:
            waiting.append((following, pool.submit(_pixels, dataset, following)))
            if len(waiting) > 2 * threads:
                item, pixels = waiting.popleft()
                yield item, pixels.result()
        for item, pixels in waiting:
            yield item, pixels.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pixels(dataset: Path, item: _Placed) -> "Tensor":
    """The item's pixels, uint8; the bytes that are decoded are the ones that were hashed."""
    path = dataset / item.sample.file
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != item.sample.sha256:
        raise ArtifactError(
            f"{path}, the picture of {item.sample.id}, is missing or damaged; run download_dataset again"
        )
    return to_bytes(decode_picture(data, path), item.placement)


def _row(item: _Placed, shard: ShardEntry) -> LatentRow:
    return LatentRow(
        sample=item.sample.id,
        dataset=item.sample.dataset,
        key=item.key,
        shard=shard.file,
        intermediary_size=item.placement.intermediary_size,
        crop=item.placement.crop,
        target_size=item.placement.target_size,
        bucket=item.placement.bucket,
    )
