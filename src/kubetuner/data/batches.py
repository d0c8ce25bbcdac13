"""Batches for training: which samples, in which order, with which captions.

A batch is of one bucket of one dataset, and as large as the dataset's batches are (``TrainSection.batch_size``). Every
batch is a function of the seed and its position alone, so a resumed run needs no sampler state. An epoch visits
each sample ``repeats + 1`` times, except those that do not fill a batch of their bucket; who they are changes with the
epoch's shuffle. A bucket that cannot fill one batch is never visited, which the log says. Where a dataset comes or goes
(``start_step``, ``end_step``), a new epoch begins.
"""

import logging
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from kubetuner.artifacts import LatentRow
from kubetuner.config.schedule import stages, weights
from kubetuner.config.sections.steps import DatasetSampling, TrainSection
from kubetuner.data.encoded_samples import EncodedSamples, Size
from kubetuner.data.latents import Maker, draw_latents
from kubetuner.errors import ArtifactError, DatasetError

logger = logging.getLogger(__name__)

# How far ahead shards are fetched where this machine has room for some of them only.
BATCHES_AHEAD = 8


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        rows: The samples; all of one dataset and one target size.
        latents: float32 ``[B, C, h, w]``.
        texts: Per sample the tensors of its caption; ``None`` for a dropped one.
        before: Samples of the run before these, in the order of micro-steps.
        masks: float32 ``[B, 1, h, w]`` in 0..1, 1 for a sample without a mask; ``None`` where none has one.
    """

    rows: tuple[LatentRow, ...]
    latents: Tensor
    texts: tuple[dict[str, Tensor] | None, ...]
    before: int
    masks: Tensor | None = None


@dataclass(frozen=True)
class _Stretch:
    """Micro-steps that draw from the same datasets.

    Attributes:
        start: Its first micro-step, from 0.
        epoch: Number of its first epoch; epochs are counted through the whole run.
        datasets: What is drawn from.
        batches: Micro-steps per epoch.
        samples: Samples per epoch.
        before: Samples of the run before its first micro-step.
    """

    start: int
    epoch: int
    datasets: tuple[str, ...]
    batches: int
    samples: int
    before: int


class _Epoch:
    """An epoch's batches in their order.

    Attributes:
        number: Counted through the whole run.
        batches: The samples of each, by position.
        before: How many samples of the epoch come before each.
    """

    def __init__(self, number: int, batches: list[tuple[int, ...]]) -> None:
        self.number, self.batches = number, batches
        self.before = array("q", accumulate(map(len, batches), initial=0))


class Batches:
    """The batches of a training run over encoded datasets.

    Args:
        section: The settings.
        latents: Folders of the latents artifacts.
        text_embeds: Folders of the text embeds artifacts.
        text_tensors: Names of a caption's tensors.
        processes: How many share an optimizer step; each makes ``gradient_accumulation_steps`` of its batches.
        maker: Makes the latents that no shard holds; ``None`` where there are none.

    Raises:
        ArtifactError: The caches are damaged or were made of different datasets.
        DatasetError: Datasets cannot fill one batch; names each of them.
    """

    def __init__(
        self,
        section: TrainSection,
        latents: Sequence[Path],
        text_embeds: Sequence[Path],
        text_tensors: Sequence[str],
        processes: int = 1,
        maker: Maker | None = None,
    ) -> None:
        self._section, self._micro_steps = section, section.gradient_accumulation_steps * processes
        self._processes = processes
        self._samples = EncodedSamples(latents, text_embeds, text_tensors, maker)
        self._sizes = {dataset.id: section.batch_size(dataset) for dataset in section.datasets}
        self._buckets = _buckets(section, self._samples)
        self.null = self._samples.text("")
        self._stretches = self._plan_stretches()
        self.batches_per_epoch = self._stretches[0].batches
        self._epoch = _Epoch(-1, [])

    def batch(self, step: int, micro: int) -> Batch:
        """The batch of micro-step ``micro`` of optimizer step ``step``, both counted from 0."""
        self._samples.renew_claims()
        position = step * self._micro_steps + micro
        stretch = self._stretch(position)
        passed, index = divmod(position - stretch.start, stretch.batches)
        epoch = stretch.epoch + passed
        if self._epoch.number != epoch:
            self._epoch = self._shuffled(stretch, epoch)
            self._samples.look()
        if self._samples.wants_order:
            self._fetch_ahead(position, index)
        rows = tuple(self._samples.rows[row] for row in self._epoch.batches[index])
        texts = tuple(self._caption(row, position, place) for place, row in enumerate(rows))
        posterior = torch.Generator().manual_seed(
            random.Random(f"{self._section.seed}/latents/{position}").getrandbits(63)
        )
        following = [row for place in self._ahead(index)[1:] for row in self._epoch.batches[place]]
        tensors = self._samples.latents(rows, following)
        latents = torch.stack([draw_latents(one, posterior) for one in tensors])
        before = stretch.before + passed * stretch.samples + self._epoch.before[index]
        return Batch(rows, latents, texts, before, self._masks(rows, latents))

    def epochs(self, micro_steps: int) -> float:
        """Epochs gone through after that many micro-steps, at least 1 of them."""
        stretch = self._stretch(micro_steps - 1)
        return stretch.epoch + (micro_steps - stretch.start) / stretch.batches

    def _plan_stretches(self) -> list[_Stretch]:
        sizes = self._sizes
        lengths = {name: sum(len(rows) // sizes[name] for rows in buckets) for name, buckets in self._buckets.items()}
        found: list[_Stretch] = []
        epoch = before = 0
        for stage in stages(self._section.datasets):
            batches = sum(lengths[name] for name in stage.datasets)
            samples = sum(lengths[name] * sizes[name] for name in stage.datasets)
            start = (stage.first - 1) * self._micro_steps
            found.append(_Stretch(start, epoch, stage.datasets, batches, samples, before))
            if stage.last is not None and batches:
                passed, rest = divmod((stage.last - stage.first + 1) * self._micro_steps, batches)
                before += passed * samples + self._first_samples(found[-1], epoch + passed, rest)
                epoch += passed + (rest > 0)
        return found

    def _first_samples(self, stretch: _Stretch, epoch: int, batches: int) -> int:
        """Samples of the first ``batches`` of an epoch; their order is asked only where it matters."""
        sizes = {self._sizes[name] for name in stretch.datasets}
        return batches * sizes.pop() if len(sizes) == 1 else self._shuffled(stretch, epoch).before[batches]

    def _stretch(self, position: int) -> _Stretch:
        """The stretch that a micro-step lies in."""
        stretch = next(one for one in reversed(self._stretches) if one.start <= position)
        if not stretch.batches:
            step = position // self._micro_steps + 1
            raise DatasetError(f"no dataset is drawn from in step {step}; correct start_step and end_step and run plan")
        return stretch

    def _masks(self, rows: Sequence[LatentRow], latents: Tensor) -> Tensor | None:
        if not any(row.mask for row in rows):
            return None
        size = latents.shape[-2:]
        masks = [self._samples.mask(row) if row.mask else torch.ones(1, *size) for row in rows]
        for row, mask in zip(rows, masks, strict=True):
            if mask.shape[1:] != size:
                got, wanted = ("x".join(map(str, shape)) for shape in (mask.shape[1:], size))
                raise ArtifactError(f"the mask of {row.sample} is {got} and its latents {wanted}; run cache_vae again")
        return torch.stack(masks)

    def _fetch_ahead(self, position: int, index: int) -> None:
        """Tell the store what this batch and those that follow in the epoch read."""
        self._samples.fetch_ahead(
            [
                [
                    (row, self._drawn(self._samples.rows[row], position + ahead - index, place) or "")
                    for place, row in enumerate(self._epoch.batches[ahead])
                ]
                for ahead in self._ahead(index)
            ]
        )

    def _ahead(self, index: int) -> range:
        """The epoch's batches that this process takes next, from ``index`` on; others take those in between."""
        return range(index, len(self._epoch.batches), self._processes)[:BATCHES_AHEAD]

    def _caption(self, row: LatentRow, position: int, place: int) -> dict[str, Tensor] | None:
        text = self._drawn(row, position, place)
        return None if text is None else self._samples.text(text)

    def _drawn(self, row: LatentRow, position: int, place: int) -> str | None:
        """The caption that the sample is used with; ``None`` when it is dropped."""
        chance = random.Random(f"{self._section.seed}/caption/{position}/{place}")
        if chance.random() < self._section.caption_dropout_probability:
            return None
        return chance.choice(self._samples.captions(row.sample))

    def _shuffled(self, stretch: _Stretch, epoch: int) -> _Epoch:
        """All batches of an epoch. Datasets take turns by chance until each has run out."""
        queues = {name: self._dataset_batches(name, epoch) for name in stretch.datasets}
        weight = weights(self._section, {name: len(queue) for name, queue in queues.items()})
        chance = random.Random(f"{self._section.seed}/datasets/{epoch}")
        batches: list[tuple[int, ...]] = []
        while left := [name for name, queue in queues.items() if queue]:
            chosen = chance.choices(left, [weight[name] for name in left])[0]
            batches.append(queues[chosen].pop())
        return _Epoch(epoch, batches)

    def _dataset_batches(self, dataset: str, epoch: int) -> list[tuple[int, ...]]:
        size = self._sizes[dataset]
        chance = random.Random(f"{self._section.seed}/samples/{dataset}/{epoch}")
        batches: list[tuple[int, ...]] = []
        for rows in self._buckets[dataset]:
            shuffled = chance.sample(rows, len(rows))
            batches += [tuple(shuffled[start : start + size]) for start in range(0, len(rows) - size + 1, size)]
        chance.shuffle(batches)
        return batches


def _buckets(section: TrainSection, samples: EncodedSamples) -> dict[str, list[list[int]]]:
    """Dataset → its buckets with repeats, those that fill a batch; samples by position."""
    found: dict[str, list[list[int]]] = {}
    problems: list[str] = []
    for dataset in section.datasets:
        batch = section.batch_size(dataset)
        groups = samples.groups.get(dataset.id, {})
        repeated = {size: groups[size] * (dataset.repeats + 1) for size in sorted(groups)}
        full = {size: bucket for size, bucket in repeated.items() if len(bucket) >= batch}
        found[dataset.id] = list(full.values())
        if not full:
            problems.append(_too_small(dataset, groups, batch))
            continue
        for width, height in sorted(repeated.keys() - full.keys()):
            logger.warning(
                "dataset %s: the %d samples of bucket %dx%d, used %d time(s) each, do not fill a batch of %d: left out",
                dataset.id, len(groups[width, height]), width, height, dataset.repeats + 1, batch,
            )  # fmt: skip
    if problems:
        raise DatasetError("; ".join(problems))
    return found


def _too_small(dataset: DatasetSampling, groups: Mapping[Size, list[int]], size: int) -> str:
    if not groups:
        return f"dataset {dataset.id!r} has no usable samples"
    counts = ", ".join(f"{w}x{h}: {len(rows)}" for (w, h), rows in sorted(groups.items()))
    most = max(len(rows) for rows in groups.values())
    return (
        f"dataset {dataset.id!r} cannot fill one batch of {size}: its buckets hold {counts} samples, used "
        f"{dataset.repeats + 1} time(s) each; set repeats to {-(-size // most) - 1} or train_batch_size to "
        f"{most * (dataset.repeats + 1)}"
    )
