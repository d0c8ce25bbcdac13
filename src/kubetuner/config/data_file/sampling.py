"""The keys of a picture entry that say how it is drawn from in training, checked against its role."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kubetuner.config.keys import Values
from kubetuner.config.sections.objective import FlowSchedule
from kubetuner.config.sections.steps import DatasetSampling
from kubetuner.errors import Problem

_TRAINING_ONLY = (
    "probability", "start_step", "end_step", "start_epoch", "end_epoch", "is_regularisation_data", "train_batch_size",
)  # fmt: skip
_FARTHEST = math.log(999)
"""Its sigmoid is 0.999: an offset beyond it makes half of the levels noise alone, or no noise at all."""


@dataclass(frozen=True)
class Epochs:
    """The epochs, counted from 1, that draw from a dataset; the plan makes optimizer steps of them.

    Attributes:
        first: ``start_epoch``.
        last: ``end_epoch``; ``None`` for no end.
    """

    first: int = 1
    last: int | None = None


def read_sampling(
    values: Values, where: str, problems: list[Problem], notes: list[str], *, facts: Mapping[str, str]
) -> DatasetSampling:
    """The entry's ``DatasetSampling``.

    Args:
        values: The entry's values.
        where: File and index for messages.
        problems: Receives one entry per fault.
        notes: Receives what was accepted without effect.
        facts: ``model_type`` of the run.
    """
    if values.text("dataset_type") == "eval":
        _check_held_out(values, where, problems)
    for unit in ("step", "epoch"):
        first, last = values.integer(f"start_{unit}", 0), values.integer(f"end_{unit}", 0)
        if f"end_{unit}" in values and last < first:
            message = f"is {last}, before start_{unit} {first}; the dataset is never drawn from."
            problems.append(Problem(f"{where}.end_{unit}", message))
    parent = values.flag("is_regularisation_data")
    if parent and facts.get("model_type") != "lora":
        reason = "has no effect on a full fine-tune: the dataset is trained on like any other"
        notes.append(f"{where}.`is_regularisation_data`: {reason}")
        parent = False
    return DatasetSampling.model_validate(
        {
            "id": values.text("id"),
            **values.pick(
                "repeats", "probability", "start_step", "end_step", "train_batch_size", "timestep_sampling_offset"
            ),
            "is_regularisation_data": parent,
        }
    )


def read_epochs(values: Values) -> Epochs | None:
    """``start_epoch`` and ``end_epoch`` of an entry; ``None`` where they ask for nothing."""
    epochs = Epochs(max(values.integer("start_epoch", 1), 1), values.integer("end_epoch", 0) or None)
    return epochs if epochs != Epochs() else None


def _check_held_out(values: Values, where: str, problems: list[Problem]) -> None:
    used = [name for name in ("repeats", "timestep_sampling_offset") if values.number(name, 0.0)]
    used += [name for name in _TRAINING_ONLY if name in values and values.get(name) is not False]
    message = "has no meaning with dataset_type eval; remove it."
    problems.extend(Problem(f"{where}.{name}", message) for name in used)


def offset_fault(offset: float, family: str, schedule: FlowSchedule | None) -> str:
    """Why ``timestep_sampling_offset`` can have no effect, or not the one that is wanted; empty where it is right.

    Args:
        offset: The dataset's.
        family: ``model_family``.
        schedule: How the family draws its noise levels; ``None`` for one that trains no flow.
    """
    if not offset:
        return ""
    if schedule is None:
        return f"has no effect with model_family {family}, which trains no flow; remove it."
    keys = {"uniform": "flow_use_uniform_schedule", "beta": "flow_use_beta_schedule"}
    other = "flow_custom_timesteps" if schedule.sigmas else keys.get(schedule.density)
    if other:
        return f"has no effect with {other}, which draws no normal values to add it to; remove one of them."
    if abs(schedule.sigmoid_scale * offset) > _FARTHEST:
        levels = "above 0.999, noise alone" if offset > 0 else "below 0.001, without noise"
        return (
            f"is {offset:g}, so that half of the noise levels would be {levels}: it counts in standard deviations, "
            f"not in timesteps, and is at most {_FARTHEST / schedule.sigmoid_scale:.1f} either way."
        )
    return ""
