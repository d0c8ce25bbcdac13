"""The keys of a picture entry that say how often and when it is drawn from, checked against its role."""

from collections.abc import Mapping

from kubetuner.config.keys import Values
from kubetuner.config.sections import DatasetSampling
from kubetuner.errors import Problem

_TRAINING_ONLY = ("probability", "start_step", "end_step", "is_regularisation_data")


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
    last = values.integer("end_step", 0)
    if "end_step" in values and last < values.integer("start_step", 0):
        message = f"is {last}, before start_step {values.integer('start_step', 0)}; the dataset is never drawn from."
        problems.append(Problem(f"{where}.end_step", message))
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


def _check_held_out(values: Values, where: str, problems: list[Problem]) -> None:
    used = ["repeats"] if values.integer("repeats", 0) > 0 else []
    used += [name for name in _TRAINING_ONLY if name in values and values.get(name) is not False]
    message = "has no meaning with dataset_type eval; remove it."
    problems.extend(Problem(f"{where}.{name}", message) for name in used)
