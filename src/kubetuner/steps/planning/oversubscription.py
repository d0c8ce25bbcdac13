"""``allow_dataset_oversubscription``: datasets that are too small for a batch are gone through more often."""

import math
from collections.abc import Sequence
from dataclasses import replace

from kubetuner.config.sections.steps import TrainSection
from kubetuner.steps.planning.advice import fewest_passes
from kubetuner.steps.planning.datasets import Measured


def oversubscribe(measured: Sequence[Measured], train: TrainSection) -> tuple[list[Measured], list[str]]:
    """Raise ``repeats`` where the user did not set them and pictures would be left out.

    Returns:
        The datasets, and a sentence for each that was changed.
    """
    raised: list[Measured] = []
    remarks: list[str] = []
    for one in measured:
        repeats = needed_repeats(one, train) if one.trained_on and one.samples else 0
        if repeats <= one.entry.sampling.repeats or one.entry.repeats_set:
            raised.append(one)
            continue
        sampling = one.entry.sampling.model_copy(update={"repeats": repeats})
        raised.append(replace(one, entry=replace(one.entry, sampling=sampling)))
        remarks.append(
            f"`{one.id}`: repeats was not set and is raised to {repeats} (allow_dataset_oversubscription), so that its "
            f"{one.samples} pictures are seen {repeats + 1} times per epoch and every bucket fills a batch"
        )
    return raised, remarks


def needed_repeats(measured: Measured, train: TrainSection) -> int:
    """The fewest repeats with which every bucket fills a batch and their batches fill an optimizer step."""
    counts = [sizes.total() for sizes in measured.buckets.values()]
    size = train.batch_size(measured.entry.sampling)
    every = math.ceil(size / min(counts))
    return fewest_passes(counts, size, train.planned_micro_steps, every) - 1
