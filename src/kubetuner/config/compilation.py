"""``dynamo_*``: what of the denoiser torch.compile compiles, and how; knows no torch."""

import os
import shutil
import sys
from typing import Literal

from kubetuner.config.keys import Key, Rule, Values, one_of
from kubetuner.config.sections.base import Section
from kubetuner.errors import Problem

# They record CUDA graphs, which nobody has run with accumulated gradients here: the next recording may overwrite them.
_CUDA_GRAPH_MODES = frozenset({"reduce-overhead", "max-autotune"})
COMPILATION_RULES: dict[str, Rule] = {
    "dynamo_backend": Key(
        "str",
        one_of("no", "inductor", "aot_eager", "eager"),
        later=frozenset({"cudagraphs", "fx2trt", "hpu_backend", "ipex", "ofi", "onnxrt", "tensorrt", "tvm"}),
    ),
    "dynamo_mode": Key(
        "str",
        {"": "default", **one_of("default", "max-autotune-no-cudagraphs")},
        later=_CUDA_GRAPH_MODES,
    ),
    "dynamo_dynamic": Key("bool"),
    "dynamo_fullgraph": Key("bool"),
    "dynamo_use_regional_compilation": Key("bool"),
}
_OFF: dict[str, object] = {
    "dynamo_mode": "default", "dynamo_dynamic": False, "dynamo_fullgraph": False,
    "dynamo_use_regional_compilation": False,
}  # fmt: skip
"""What SimpleTuner writes for "not chosen"."""


class CompileSettings(Section):
    """``dynamo_backend`` other than ``no``.

    Attributes:
        backend: ``inductor`` writes kernels; ``aot_eager`` and ``eager`` only trace, to find what goes wrong.
        mode: ``dynamo_mode``, of inductor.
        dynamic: ``dynamo_dynamic``: graphs for shapes that are not known, instead of one for each shape.
        fullgraph: ``dynamo_fullgraph``: a piece that cannot be traced is an error.
        regional: ``dynamo_use_regional_compilation``: the repeated blocks, compiled once for all, and not the whole.
    """

    backend: Literal["inductor", "aot_eager", "eager"]
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    dynamic: bool = False
    fullgraph: bool = False
    regional: bool = True


def read_compilation(values: Values, where: str, problems: list[Problem]) -> CompileSettings | None:
    """The ``dynamo_*`` keys; ``None`` without a backend."""
    backend, family = values.text("dynamo_backend", "no"), values.text("model_family")

    def refuse(name: str, message: str) -> None:
        problems.append(Problem(f"{where}.{name}", message))

    if backend == "no":
        for name, neutral in _OFF.items():
            if name in values and values.get(name) != neutral:
                refuse(name, "needs dynamo_backend, for example inductor; set that too, or remove it.")
        return None
    mode = values.text("dynamo_mode", "default")
    if mode != "default" and backend != "inductor":
        refuse("dynamo_mode", f"has no effect with dynamo_backend {backend}, which writes no kernels; remove it.")
    if values.flag("dynamo_dynamic") and backend == "inductor" and family == "sana":
        refuse("dynamo_dynamic", "is true, but inductor fails on Sana's blocks without known shapes; set it to false.")
    if (precision := values.text("base_model_precision", "no_change")) != "no_change":
        message = f"is {backend!r}; compiling over base_model_precision {precision!r} is not available yet; use 'no'."
        refuse("dynamo_backend", message)
    return CompileSettings.model_validate(
        {
            "backend": backend,
            "mode": mode,
            "dynamic": values.flag("dynamo_dynamic"),
            "fullgraph": values.flag("dynamo_fullgraph"),
            "regional": values.flag("dynamo_use_regional_compilation", True),
        }
    )


def missing_compiler(settings: CompileSettings | None) -> str:
    """The compiler that inductor would run and that is not here; empty when nothing is missing."""
    if settings is None or settings.backend != "inductor":
        return ""
    wanted = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return "" if shutil.which(wanted) else wanted
