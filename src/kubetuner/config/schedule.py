"""Which datasets are drawn from when, and how often: ``start_step``, ``end_step`` and ``probability`` of an entry.

Optimizer steps are counted from 1 here, as in SimpleTuner: with ``end_step`` 300 and ``start_step`` 301 one dataset
takes over from another after step 300. ``start_step`` 0 and 1 both mean "from the first step on".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kubetuner.config.sections.steps import DatasetSampling, TrainSection


@dataclass(frozen=True)
class Stage:
    """Steps in which the same datasets are drawn from.

    Attributes:
        first: Its first optimizer step, from 1.
        last: Its last optimizer step; ``None`` for no end.
        datasets: Ids in the order of the data file; none where nothing is drawn from.
    """

    first: int
    last: int | None
    datasets: tuple[str, ...]

    def __str__(self) -> str:
        return f"steps {self.first} to {self.last}" if self.last is not None else f"steps from {self.first} on"


def stages(datasets: Sequence[DatasetSampling]) -> tuple[Stage, ...]:
    """All stages, in order: they begin with step 1, leave no step out, and the last one has no end."""
    starts = {1} | {max(dataset.start_step, 1) for dataset in datasets}
    starts |= {dataset.end_step + 1 for dataset in datasets if dataset.end_step is not None}
    ordered = sorted(starts)
    return tuple(
        Stage(first, after - 1 if after else None, tuple(one.id for one in datasets if _is_drawn(one, first)))
        for first, after in zip(ordered, [*ordered[1:], None], strict=True)
    )


def empty_stages(datasets: Sequence[DatasetSampling], steps: int) -> tuple[Stage, ...]:
    """Stages of a run of ``steps`` optimizer steps in which there is no dataset to draw from."""
    empty = (stage for stage in stages(datasets) if not stage.datasets and stage.first <= steps)
    return tuple(Stage(stage.first, min(stage.last or steps, steps), ()) for stage in empty)


def _is_drawn(dataset: DatasetSampling, step: int) -> bool:
    return dataset.start_step <= step and (dataset.end_step is None or step <= dataset.end_step)


def weights(train: TrainSection, batches: Mapping[str, int]) -> dict[str, float]:
    """How likely each dataset's turn is (``data_backend_sampling``); not normalised.

    Auto-weighting is ``probability`` times the dataset's length, repeats counted; uniform is ``probability`` alone.

    Args:
        train: The section.
        batches: Dataset → its batches per epoch, for the datasets to choose among.
    """
    probability = {dataset.id: dataset.probability for dataset in train.datasets}
    if train.data_backend_sampling == "uniform":
        return {name: probability[name] for name in batches}
    return {name: probability[name] * count for name, count in batches.items()}
