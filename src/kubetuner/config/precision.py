"""``base_model_precision``: how the frozen base under an adapter is stored, and what each way needs; knows no torch."""

from importlib.util import find_spec

from kubetuner.config.sections.steps import TrainSection

PRECISIONS = ("no_change", "int8-torchao", "int8-quanto", "nf4-bnb")
LATER = frozenset(
    {
        "int4-quanto", "int2-quanto", "int8dq-torchao", "int4-torchao", "int8dq-int4-torchao", "fp8-torchao",
        "fp8wo-torchao", "fp8-int4-torchao", "fp8-native", "fp8-transformerengine",
    }
)  # fmt: skip
_FP8 = "SimpleTuner refuses it for these model families too, and 8-bit integers are of the same size."
REFUSED = {"fp8-quanto": _FP8, "fp8uz-quanto": _FP8}
BYTES = {"int8-torchao": 1.0, "int8-quanto": 1.0, "nf4-bnb": 0.5}
"""Per weight; scales come on top."""
_LIBRARIES = {
    "int8-torchao": ("torchao", "torchao"),
    "int8-quanto": ("optimum.quanto", "optimum-quanto"),
    "nf4-bnb": ("bitsandbytes", "bitsandbytes"),
}


def missing_library(precision: str) -> str:
    """The distribution to install for ``precision``, or an empty text when nothing is missing."""
    module, distribution = _LIBRARIES.get(precision, ("", ""))
    return distribution if module and not _is_there(module) else ""


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # The package around it: other libraries install an ``optimum`` without quanto.
        return False


def unroundable(train: TrainSection, precision: str) -> str:
    """Why the base's weights cannot be stored in ``precision``, as the end of a sentence, or an empty text."""
    adapter = train.lora
    if adapter is None:
        return "and model_type full trains and saves the very weights that would be rounded"
    if adapter.use_dora:
        return "and use_dora trains the magnitudes of the very weights that would be rounded"
    if adapter.init_type in ("olora", "pissa"):
        return f"and lora_init_type {adapter.init_type} takes its start out of the weights, which cannot be rounded yet"
    if adapter.algorithm != "lora" and precision == "nf4-bnb":
        return f"whose weights are packed in pairs, so that PEFT's {adapter.title} does not see their shape"
    return ""
