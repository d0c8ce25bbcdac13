"""The keys of a picture entry that say how often and when it is drawn from, checked against its role."""

from collections.abc import Mapping
from dataclasses import dataclass

from kubetuner.config.keys import Values
from kubetuner.config.sections.steps import DatasetSampling
from kubetuner.errors import Problem

_TRAINING_ONLY = ("probability", "start_step", "end_step", "start_epoch", "end_epoch", "is_regularisation_data")


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
            **values.pick("repeats", "probability", "start_step", "end_step"),
            "is_regularisation_data": parent,
        }
    )


def read_epochs(values: Values) -> Epochs | None:
    """``start_epoch`` and ``end_epoch`` of an entry; ``None`` where they ask for nothing."""
    epochs = Epochs(max(values.integer("start_epoch", 1), 1), values.integer("end_epoch", 0) or None)
    return epochs if epochs != Epochs() else None


def _check_held_out(values: Values, where: str, problems: list[Problem]) -> None:
    used = ["repeats"] if values.integer("repeats", 0) > 0 else []
    used += [name for name in _TRAINING_ONLY if name in values and values.get(name) is not False]
    message = "has no meaning with dataset_type eval; remove it."
    problems.extend(Problem(f"{where}.{name}", message) for name in used)
