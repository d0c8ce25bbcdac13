"""The optimizers by SimpleTuner's names: which library, which settings it takes, and its defaults."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from kubetuner.errors import Problem

OptimizerName = Literal[
    "torch-adamw",
    "torch-adafactor",
    "optimi-adamw",
    "optimi-lion",
    "optimi-stableadamw",
    "prodigy",
    "bnb-adamw",
    "bnb-adamw-paged",
    "bnb-adamw8bit",
    "bnb-adamw8bit-paged",
    "bnb-lion",
    "bnb-lion-paged",
    "bnb-lion8bit",
    "bnb-lion8bit-paged",
    "ao-adamw8bit",
    "ao-adamw4bit",
    "ao-adamwfp8",
]
Option = bool | int | float
Kind = Literal["number", "whole", "flag"]

_PLAIN = {"beta1": "adam_beta1", "beta2": "adam_beta2", "weight_decay": "adam_weight_decay", "eps": "adam_epsilon"}


@dataclass(frozen=True)
class OptimizerOutline:
    """What the configuration needs to know of an optimizer.

    Attributes:
        defaults: Its own betas, weight decay and epsilon, by section field; what it does not take is absent.
        options: Further settings that ``optimizer_config`` may hold.
        learning_rate: Its own default; ``None`` for the run's.
        state_bytes: What it keeps per parameter, for the plan's estimate.
        clips: Whether gradients are clipped unless ``max_grad_norm`` says so; some optimizers limit their steps alone.
    """

    defaults: Mapping[str, float]
    options: Mapping[str, Kind] = field(default_factory=dict)
    learning_rate: float | None = None
    state_bytes: float = 8
    clips: bool = True


def _defaults(beta2: float, weight_decay: float, epsilon: float | None) -> dict[str, float]:
    taken = {"adam_beta1": 0.9, "adam_beta2": beta2, "adam_weight_decay": weight_decay}
    return taken if epsilon is None else taken | {"adam_epsilon": epsilon}


def _low_bit(name: OptimizerName) -> OptimizerOutline:
    """An optimizer of bitsandbytes or torchao; blocks of scales take a tenth on top of 4 or 8 bits."""
    lion, eight = "lion" in name, "8" in name
    bytes_each = 0.55 if "4bit" in name else 1.1 if eight else 4.0
    options = _BLOCKS if eight and name.startswith("bnb-") else {}
    return OptimizerOutline((_LION if lion else _ADAMW).defaults, options, state_bytes=bytes_each * (1 if lion else 2))


_ADAMW = OptimizerOutline(_defaults(0.999, 0.01, 1e-8))
_LION = OptimizerOutline(_defaults(0.99, 0.0, None))
_BLOCKS: dict[str, Kind] = {"min_8bit_size": "whole"}
_PRODIGY: dict[str, Kind] = {
    "d_coef": "number",
    "d0": "number",
    "growth_rate": "number",
    "slice_p": "whole",
    "use_bias_correction": "flag",
    "safeguard_warmup": "flag",
    "decouple": "flag",
}

OPTIMIZERS: dict[OptimizerName, OptimizerOutline] = {
    "torch-adamw": OptimizerOutline(_ADAMW.defaults, {"amsgrad": "flag"}),
    "torch-adafactor": OptimizerOutline(
        {"adam_weight_decay": 0.0}, {"beta2_decay": "number", "d": "number"}, state_bytes=0.1
    ),
    "optimi-adamw": OptimizerOutline(_defaults(0.99, 0.0, 1e-6), {"decouple_lr": "flag", "kahan_sum": "flag"}),
    "optimi-lion": OptimizerOutline(_LION.defaults, {"decouple_lr": "flag", "kahan_sum": "flag"}, state_bytes=4),
    "optimi-stableadamw": OptimizerOutline(
        _defaults(0.99, 0.0, 1e-6), {"decouple_lr": "flag", "kahan_sum": "flag"}, clips=False
    ),
    "prodigy": OptimizerOutline(_defaults(0.999, 0.0, 1e-8), _PRODIGY, learning_rate=1.0, state_bytes=16, clips=False),
    **{name: _low_bit(name) for name in get_args(OptimizerName) if name.startswith(("bnb-", "ao-"))},
}


def read_options(name: OptimizerName, text: str, where: str, problems: list[Problem]) -> dict[str, Option]:
    """``optimizer_config``: ``"weight_decay=0.1,beta2=0.95"`` as typed settings.

    Args:
        name: The optimizer; it decides which settings there are.
        text: The key's value.
        where: Place of the key for messages.
        problems: Receives every setting that is unknown, repeated or of another type.
    """
    outline = OPTIMIZERS[name]
    kinds: dict[str, Kind] = {short: "number" for short, key in _PLAIN.items() if key in outline.defaults}
    kinds |= outline.options
    found: dict[str, Option] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        option, separator, written = (piece.strip() for piece in part.partition("="))
        if not separator or option not in kinds:
            message = f"has {part!r}; expected name=value, where {name} takes {', '.join(kinds)}."
        elif option in found:
            message = f"has {option!r} twice; keep one of them."
        else:
            value = _typed(written, kinds[option])
            if value is not None and (option not in _PLAIN or 0 <= value < math.inf):
                found[option] = value
                continue
            least = " at least 0" if option in _PLAIN else ""
            message = f"has {part!r}; expected {_EXPECTED[kinds[option]]}{least}."
        problems.append(Problem(where, message))
    return found


def plain_settings(options: Mapping[str, Option]) -> dict[str, float]:
    """The betas, weight decay and epsilon among ``options``, by section field."""
    return {_PLAIN[name]: float(value) for name, value in options.items() if name in _PLAIN}


_EXPECTED: dict[Kind, str] = {"number": "a number", "whole": "a whole number", "flag": "true or false"}


def _typed(written: str, kind: Kind) -> Option | None:
    if kind == "flag":
        return {"true": True, "false": False}.get(written.lower())
    try:
        return int(written) if kind == "whole" else float(written)
    except ValueError:
        return None
