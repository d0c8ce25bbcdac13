"""``text_encoder_1_precision``, ``text_encoder_2_precision``, …: how frozen text encoders are stored."""

from typing import ClassVar, Literal

from kubetuner.config.keys import Values
from kubetuner.config.sections.base import Section
from kubetuner.errors import Problem

MOST_ENCODERS = 4
"""That SimpleTuner has keys for."""


class TextRounding(Section):
    """How text encoders are rounded; see :mod:`kubetuner.config.precision`.

    Attributes:
        precisions: Of the first encoder, the second, …; none when all are as they were published.
        via: Where weights are rounded (``quantize_via``); on the CPU, a GPU never holds the whole ones.
    """

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset({"via"})

    precisions: tuple[str, ...] = ()
    via: Literal["accelerator", "cpu"] = "accelerator"

    def of(self, number: int) -> str:
        """The precision of the encoder ``number``, from 1."""
        return self.precisions[number - 1] if number <= len(self.precisions) else "no_change"

    def named(self) -> dict[str, str]:
        """The precisions that change something, by their keys."""
        named = {text_precision_key(number): name for number, name in enumerate(self.precisions, 1)}
        return {key: name for key, name in named.items() if name != "no_change"}


WHOLE_TEXT = TextRounding()
"""Every encoder as it was published."""


def text_precision_key(number: int) -> str:
    """The key of the encoder ``number``, from 1."""
    return f"text_encoder_{number}_precision"


def read_text_rounding(values: Values, encoders: int, where: str, problems: list[Problem]) -> TextRounding:
    """The precisions of a family's ``encoders``; one of an encoder that it does not have is a problem."""
    given = {number: values.text(text_precision_key(number), "no_change") for number in range(1, MOST_ENCODERS + 1)}
    for number in range(encoders + 1, MOST_ENCODERS + 1):
        if given[number] != "no_change":
            count = "one text encoder" if encoders == 1 else f"{encoders} text encoders"
            message = f"is {given[number]!r}, but {values.text('model_family')} has {count}; remove it."
            problems.append(Problem(f"{where}.{text_precision_key(number)}", message))
    mine = tuple(given[number] for number in range(1, encoders + 1))
    if set(mine) == {"no_change"}:
        return WHOLE_TEXT
    return TextRounding.model_validate({"precisions": mine, **_via(values)})


def _via(values: Values) -> dict[str, object]:
    return {"via": values.text("quantize_via")} if "quantize_via" in values else {}
