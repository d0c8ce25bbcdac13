"""Batches for training: which samples, in which order, with which captions.

Every batch is a function of the seed and its position alone, so a resumed run needs no sampler state. An epoch visits
each sample ``repeats + 1`` times, except those that do not fill a batch of their bucket; who they are changes with the
epoch's shuffle.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kubetuner.artifacts import (
    CaptionRow,
    LatentRow,
    LatentsArtifact,
    TextEmbedsArtifact,
    TextRow,
    read_artifact,
    read_rows,
    verify_files,
)
from kubetuner.config.sections import DatasetSampling, TrainSection
from kubetuner.data.latents import draw_latents, latent_names
from kubetuner.data.shards import ShardReader
from kubetuner.errors import ArtifactError, DatasetError
from kubetuner.store import resolve_store

# Encoded samples below this size in all stay in memory after their first use.
MEMORY_BUDGET_BYTES = 2 << 30


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        rows: The samples; all of one dataset and one target size.
        latents: float32 ``[B, C, h, w]``.
        texts: Per sample the tensors of its caption; ``None`` for a dropped one.
    """

    rows: tuple[LatentRow, ...]
    latents: Tensor
    texts: tuple[dict[str, Tensor] | None, ...]


class Batches:
    """The batches of a training run over encoded datasets.

    Raises:
        ArtifactError: The caches are damaged or were made of different datasets.
        DatasetError: A dataset cannot fill one batch.
    """

    def __init__(
        self, section: TrainSection, latents: Sequence[Path], text_embeds: Sequence[Path], text_tensors: Sequence[str]
    ) -> None:
        self._section = section
        self._samples = EncodedSamples(latents, text_embeds, text_tensors)
        self._buckets = _buckets(section, self._samples.rows)
        self.null = self._samples.text("")
        self.batches_per_epoch = sum(
            len(rows) // section.train_batch_size for buckets in self._buckets.values() for rows in buckets
        )
        self._epoch: tuple[int, list[tuple[LatentRow, ...]]] = (-1, [])

    def batch(self, step: int, micro: int) -> Batch:
        """The batch of micro-step ``micro`` of optimizer step ``step``, both counted from 0."""
        self._samples.renew_claims()
        position = step * self._section.gradient_accumulation_steps + micro
        epoch, index = divmod(position, self.batches_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        rows = self._epoch[1][index]
        texts = tuple(self._caption(row, position, place) for place, row in enumerate(rows))
        posterior = torch.Generator().manual_seed(
            random.Random(f"{self._section.seed}/latents/{position}").getrandbits(63)
        )
        return Batch(rows, torch.stack([self._samples.latents(row, posterior) for row in rows]), texts)

    def _caption(self, row: LatentRow, position: int, place: int) -> dict[str, Tensor] | None:
        chance = random.Random(f"{self._section.seed}/caption/{position}/{place}")
        if chance.random() < self._section.caption_dropout_probability:
            return None
        return self._samples.text(chance.choice(self._samples.captions[row.sample]))

    def _shuffled(self, epoch: int) -> list[tuple[LatentRow, ...]]:
        """All batches of an epoch. Datasets take turns by chance until each has run out."""
        queues = {name: self._dataset_batches(name, epoch) for name in self._buckets}
        weights = self._weights(queues)
        chance = random.Random(f"{self._section.seed}/datasets/{epoch}")
        batches: list[tuple[LatentRow, ...]] = []
        while left := [name for name, queue in queues.items() if queue]:
            chosen = chance.choices(left, [weights[name] for name in left])[0]
            batches.append(queues[chosen].pop())
        return batches

    def _dataset_batches(self, dataset: str, epoch: int) -> list[tuple[LatentRow, ...]]:
        size = self._section.train_batch_size
        chance = random.Random(f"{self._section.seed}/samples/{dataset}/{epoch}")
        batches: list[tuple[LatentRow, ...]] = []
        for rows in self._buckets[dataset]:
            shuffled = chance.sample(rows, len(rows))
            batches += [tuple(shuffled[start : start + size]) for start in range(0, len(rows) - size + 1, size)]
        chance.shuffle(batches)
        return batches

    def _weights(self, queues: dict[str, list[tuple[LatentRow, ...]]]) -> dict[str, float]:
        """``data_backend_sampling``: auto-weighting is probability times length, uniform is probability alone."""
        probability = {dataset.id: dataset.probability for dataset in self._section.datasets}
        if self._section.data_backend_sampling == "uniform":
            return {name: probability[name] for name in queues}
        return {name: probability[name] * len(queue) for name, queue in queues.items()}


class EncodedSamples:
    """Latents and text embeddings of all shards, by sample and by text.

    Raises:
        ArtifactError: They are damaged, or made of different datasets.
    """

    def __init__(self, latents: Sequence[Path], text_embeds: Sequence[Path], text_tensors: Sequence[str]) -> None:
        self._names = tuple(text_tensors)
        self._readers: dict[str, ShardReader] = {}
        self._latent_names: dict[str, tuple[str, ...]] = {}
        self._texts: dict[str, TextRow] = {}
        self._kept: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._kept_bytes = 0
        self.rows: list[LatentRow] = []
        self.captions: dict[str, tuple[str, ...]] = {}
        parents: dict[str, Path] = {}
        for folder in latents:
            artifact = read_artifact(folder, LatentsArtifact)
            self._open(folder, artifact)
            self._latent_names.update((shard.file, latent_names(artifact)) for shard in artifact.shards)
            parents.setdefault(artifact.parents[0], folder)
            self.rows += read_rows(folder, "latents.jsonl", LatentRow)
        for folder in text_embeds:
            embeds = read_artifact(folder, TextEmbedsArtifact)
            self._open(folder, embeds)
            parents.setdefault(embeds.parents[0], folder)
            self.captions.update((row.sample, row.texts) for row in read_rows(folder, "captions.jsonl", CaptionRow))
            self._texts.update((row.text, row) for row in read_rows(folder, "texts.jsonl", TextRow))
        if len(parents) > 1:
            folders = " and ".join(str(folder) for folder in parents.values())
            raise ArtifactError(f"{folders} were made of different datasets; run cache_vae and cache_text_embeds again")
        without = [row.sample for row in self.rows if row.sample not in self.captions]
        if without:
            raise ArtifactError(
                f"{len(without)} samples such as {without[0]} have no caption; run cache_text_embeds again"
            )

    def latents(self, row: LatentRow, posterior: torch.Generator) -> Tensor:
        """The latents of a sample, float32 ``[C, h, w]``; drawn by ``posterior`` where the cache holds moments."""
        return draw_latents(self._read(row.key, row.shard, self._latent_names[row.shard]), posterior)

    def text(self, text: str) -> dict[str, Tensor]:
        """The embedding of a caption by tensor name; floating tensors are float32."""
        if text not in self._texts:
            raise ArtifactError(f"no embedding of {text!r}; run cache_text_embeds again")
        row = self._texts[text]
        return self._read(row.key, row.shard, self._names)

    def renew_claims(self) -> None:
        """Keep the shards from being collected as garbage while training takes days."""
        for reader in set(self._readers.values()):
            reader.renew_claims()

    def _open(self, folder: Path, artifact: LatentsArtifact | TextEmbedsArtifact) -> None:
        verify_files(folder, artifact)
        reader = ShardReader(resolve_store(folder))
        reader.verify(artifact.shards)
        self._readers.update((shard.file, reader) for shard in artifact.shards)

    def _read(self, key: str, shard: str, names: tuple[str, ...]) -> dict[str, Tensor]:
        kept = self._kept.get((key, shard))
        if kept is not None:
            return kept
        tensors = {name: _float(tensor) for name, tensor in self._readers[shard].tensors(key, shard, names).items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._kept_bytes + size <= MEMORY_BUDGET_BYTES:
            self._kept[key, shard] = tensors
            self._kept_bytes += size
        return tensors


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _buckets(section: TrainSection, rows: Sequence[LatentRow]) -> dict[str, list[list[LatentRow]]]:
    """Dataset → its buckets with repeats, those that fill a batch."""
    found: dict[str, list[list[LatentRow]]] = {}
    for dataset in section.datasets:
        groups: dict[tuple[int, int], list[LatentRow]] = defaultdict(list)
        for row in sorted(rows, key=lambda row: row.sample):
            if row.dataset == dataset.id:
                groups[row.target_size].append(row)
        repeated = [groups[size] * (dataset.repeats + 1) for size in sorted(groups)]
        full = [bucket for bucket in repeated if len(bucket) >= section.train_batch_size]
        if not full:
            raise DatasetError(_too_small(dataset, groups, section.train_batch_size))
        found[dataset.id] = full
    return found


def _too_small(dataset: DatasetSampling, groups: dict[tuple[int, int], list[LatentRow]], size: int) -> str:
    if not groups:
        return f"dataset {dataset.id!r} has no usable samples"
    counts = ", ".join(f"{w}x{h}: {len(rows)}" for (w, h), rows in sorted(groups.items()))
    most = max(len(rows) for rows in groups.values())
    return (
        f"dataset {dataset.id!r} cannot fill one batch of {size}: its buckets hold {counts} samples, used "
        f"{dataset.repeats + 1} time(s) each; set repeats to {-(-size // most) - 1} or train_batch_size to {most}"
    )
