"""Numbers that people set as environment variables."""

import math
from collections.abc import Mapping

from kubetuner.errors import InputError


def number_above_zero(
    environment: Mapping[str, str], name: str, expected: str, *, below: float = math.inf
) -> float | None:
    """What the variable ``name`` says, or ``None`` where it is empty or not set.

    Args:
        environment: ``os.environ``.
        name: The variable.
        expected: What it should be, as the end of a sentence that begins with "expected".
        below: It must be less.

    Raises:
        InputError: It is no number between 0 and ``below``.
    """
    text = environment.get(name, "")
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < below:
        raise InputError(f"{name} is {text!r}; expected {expected}")
    return number
