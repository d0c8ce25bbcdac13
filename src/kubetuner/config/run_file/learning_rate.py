"""``learning_rate`` with ``lr_scale`` and ``lr_scale_sqrt``."""

import math

from kubetuner.config.keys import Values
from kubetuner.config.sections.steps import TrainSection
from kubetuner.errors import Problem


def read_rate(values: Values, own: float | None, where: str, problems: list[Problem]) -> float:
    """The learning rate of a step: with ``lr_scale`` times its pictures, with ``lr_scale_sqrt`` too times their root.

    Several processes count where ``num_train_processes`` says how many, and ``num_machines`` too; how many GPUs a pod
    gets is not known here.

    Args:
        values: The checked keys.
        own: The rate of an optimizer that finds the right one itself; ``None`` for the others.
        where: The file, for messages.
        problems: Receives what is wrong.
    """
    fields = TrainSection.model_fields
    rate = values.number("learning_rate", fields["learning_rate"].default if own is None else own)
    scales, root = values.flag("lr_scale"), values.flag("lr_scale_sqrt")
    if root and not scales:
        problems.append(Problem(f"{where}.lr_scale_sqrt", "needs lr_scale."))
    if not scales:
        return rate
    if own is not None:
        message = (
            f"is true, but {values.text('optimizer')} finds the rate itself, as a factor of learning_rate; remove it."
        )
        problems.append(Problem(f"{where}.lr_scale", message))
    names = ("train_batch_size", "gradient_accumulation_steps", "num_train_processes", "num_machines")
    pictures = math.prod(max(values.integer(name, fields[name].default), 1) for name in names)
    return rate * (math.sqrt(pictures) if root else pictures)
