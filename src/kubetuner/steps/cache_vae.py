"""The ``cache_vae`` step: pictures of a dataset artifact in, VAE latents out."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kubetuner.artifacts import (
    DatasetArtifact,
    LatentRow,
    LatentsArtifact,
    Sample,
    ShardEntry,
    Skipped,
    TensorSpec,
    fingerprint,
    list_files,
    read_artifact,
    read_rows,
    write_artifact,
    write_rows,
)
from kubetuner.config.sections import CacheVaeSection
from kubetuner.data.geometry import Placement, TooSmall, place
from kubetuner.progress import Progress
from kubetuner.store import Store, resolve_store

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

ROWS_FILE = "latents.jsonl"
# A shard is written, and so survives a kill, after this many encoded samples.
SAMPLES_PER_SHARD = 256


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

    A latent's key is made of the picture's bytes, its geometry, the encoder, the dtype and the seed, and its posterior
    noise is drawn from that key: neither batches nor shards change it.

    Raises:
        ArtifactError: ``dataset`` is incomplete or damaged.
    """
    source = read_artifact(dataset, DatasetArtifact)
    store = resolve_store(out)
    namespace = f"latents-{fingerprint(section.model, section.dtype)[:16]}"
    placed, skipped = _place_all(section, dataset, shard, num_shards)
    known = store.known(namespace, {item.key for item in placed})
    missing = list({item.key: item for item in placed if item.key not in known}.values())
    written, broken = _encode(section, dataset, store, namespace, missing)
    known |= written
    skipped += broken
    rows = [_row(item, known[item.key]) for item in placed if item.key in known]
    logger.info("latents: %d reused, %d encoded, %d skipped", len(rows) - len(written), len(written), len(skipped))
    shards = {known[row.key].file: known[row.key] for row in rows}
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out, ROWS_FILE, rows)
    artifact = LatentsArtifact(
        fingerprint=fingerprint(section.deciding(), source.fingerprint, (shard, num_shards)),
        parents=(source.fingerprint,),
        files=list_files(out),
        num_samples=len(rows),
        encoded=len(written),
        reused=len(rows) - len(written),
        tensors={"latents": TensorSpec(dtype=section.dtype, shape=(None, None, None))},
        shards=tuple(shards[file] for file in sorted(shards)),
        skipped=tuple(skipped),
    )
    write_artifact(out, artifact)
    return artifact


def _place_all(
    section: CacheVaeSection, dataset: Path, shard: int, num_shards: int
) -> tuple[list[_Placed], list[Skipped]]:
    """The geometry and key of each of this shard's samples; samples that are too small are skipped."""
    geometries = {entry.id: entry.geometry for entry in section.datasets}
    placed: list[_Placed] = []
    skipped: list[Skipped] = []
    for index, sample in enumerate(read_rows(dataset, "samples.jsonl", Sample)):
        if index % num_shards != shard or sample.dataset not in geometries:
            continue
        geometry = geometries[sample.dataset]
        placement = place(geometry, sample.width, sample.height, f"{section.seed}:{sample.sha256}")
        if isinstance(placement, TooSmall):
            skipped.append(Skipped(name=sample.id, reason=placement.reason))
            continue
        key = fingerprint(
            sample.sha256, placement.intermediary_size, placement.crop, placement.target_size,
            section.model, section.dtype, section.seed,
        )  # fmt: skip
        placed.append(_Placed(sample, placement, key))
    return placed, skipped


def _encode(
    section: CacheVaeSection, dataset: Path, store: Store, namespace: str, missing: Sequence[_Placed]
) -> tuple[dict[str, ShardEntry], list[Skipped]]:
    """Encode ``missing`` batch by batch; returns key → the shard written, and samples with non-finite latents."""
    if not missing:
        return {}, []
    import torch

    from kubetuner.families import load_family

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = load_family(section.model.family)
    vae = family.load_vae(section.model, device)
    dtype = torch.bfloat16 if section.dtype == "bf16" else torch.float32
    skipped: list[Skipped] = []
    written: dict[str, ShardEntry] = {}
    ready: dict[str, dict[str, Tensor]] = {}
    with Progress("cache_vae", len(missing), "pictures") as progress, torch.inference_mode():
        for batch in _batches(missing, section.vae_batch_size):
            pixels = torch.stack([_pixels(dataset, item) for item in batch]).to(device)
            shape = family.latent_shape(vae, pixels.shape[2], pixels.shape[3])
            noise = torch.stack([_noise(item.key, shape) for item in batch]).to(device)
            for item, latents in zip(batch, family.encode_pixels(vae, pixels, noise).cpu(), strict=True):
                if torch.isfinite(latents).all():
                    ready[item.key] = {"latents": latents.to(dtype)}
                else:
                    skipped.append(Skipped(name=item.sample.id, reason="the VAE gave latents that are not finite"))
            if len(ready) >= SAMPLES_PER_SHARD:
                written |= dict.fromkeys(ready, store.write_shard(namespace, ready))
                ready = {}
            progress.advance(len(batch))
    if ready:
        written |= dict.fromkeys(ready, store.write_shard(namespace, ready))
    return written, skipped


def _batches(items: Sequence[_Placed], size: int) -> Iterator[Sequence[_Placed]]:
    """Groups of at most ``size`` samples that share a target size."""
    groups: dict[tuple[int, int], list[_Placed]] = defaultdict(list)
    for item in items:
        groups[item.placement.target_size].append(item)
    for target in sorted(groups):
        for start in range(0, len(groups[target]), size):
            yield groups[target][start : start + size]


def _pixels(dataset: Path, item: _Placed) -> "Tensor":
    from kubetuner.data.pictures import open_picture, to_pixels

    return to_pixels(open_picture(dataset / item.sample.file), item.placement)


def _noise(key: str, shape: tuple[int, int, int]) -> "Tensor":
    """Standard normal noise that depends on the sample's key alone."""
    import torch

    generator = torch.Generator().manual_seed(int(key[:15], 16))
    return torch.randn(shape, generator=generator)


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
