"""What the plan says of datasets whose noise levels are drawn otherwise than the others'."""

import math

from kubetuner.config.sections.steps import TrainSection


def level_remarks(train: TrainSection) -> list[str]:
    """One line for each dataset with a ``timestep_sampling_offset``."""
    return [
        f"`{dataset.id}`: half of its noise levels are above sigma {_median(train, offset):.2f} before the shift, "
        f"those of a dataset without an offset above 0.50 (timestep_sampling_offset {offset:g})"
        for dataset in train.datasets
        if (offset := dataset.timestep_sampling_offset)
    ]


def _median(train: TrainSection, offset: float) -> float:
    return 1 / (1 + math.exp(-train.flow.sigmoid_scale * offset))
