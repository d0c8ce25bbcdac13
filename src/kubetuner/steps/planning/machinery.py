"""What a run's machinery needs: libraries, and a store that can be used."""

import os
from importlib.util import find_spec

from kubetuner.config.attention import PACKAGES, is_installed
from kubetuner.config.compilation import missing_compiler
from kubetuner.config.precision import missing_library
from kubetuner.config.sections.steps import TrainSection
from kubetuner.config.text_rounding import TextRounding
from kubetuner.config.trainjob import TRAINJOB_VARIABLE, no_trainjob, trainjob_settings
from kubetuner.errors import ArtifactError, InputError, Problem
from kubetuner.store import STORE_VARIABLE, open_store


def library_problems(train: TrainSection, text: TextRounding) -> list[Problem]:
    """What training and text encoders will miss here.

    Where there is no torch, they will run elsewhere, and that place cannot be asked.
    """
    if find_spec("torch") is None:
        return []
    problems = []
    mechanism = train.attention_mechanism
    if not is_installed(mechanism):
        message = (
            f"is {mechanism!r}, and the Python package {PACKAGES[mechanism]} is not installed; "
            "install it, or use 'diffusers', which takes the fastest kernel of PyTorch's own."
        )
        problems.append(Problem("config.json.attention_mechanism", message))
    for key, precision in ({"base_model_precision": train.base_model_precision} | text.named()).items():
        if distribution := missing_library(precision):
            message = (
                f"is {precision!r}, and the Python package {distribution} is not installed; "
                "install kubetuner[quantised], or use 'no_change'."
            )
            problems.append(Problem(f"config.json.{key}", message))
    if compiler := missing_compiler(train.compilation):
        message = (
            f"is 'inductor', which needs a C++ compiler, and {compiler} is not installed; "
            "install it, name another one in the environment variable CXX, or use 'no'."
        )
        problems.append(Problem("config.json.dynamo_backend", message))
    return problems


def trainjob_problems(train: TrainSection) -> list[Problem]:
    """What is missing for training on several machines, or wrong with how the environment describes them."""
    try:
        settings = trainjob_settings()
    except InputError as error:
        return [Problem(TRAINJOB_VARIABLE, str(error))]
    if settings is None:
        told = no_trainjob(train.num_machines).removeprefix("num_machines ")
        return [Problem("config.json.num_machines", told)] if train.num_machines > 1 else []
    return [Problem(TRAINJOB_VARIABLE, problem) for problem in settings.unseen()]


def store_problems() -> list[Problem]:
    """What is wrong with the store that the environment names: steps would find out after hours of work."""
    address = os.environ.get(STORE_VARIABLE, "")
    if not address:
        return []
    try:
        open_store(address).files.check()
    except (ArtifactError, InputError) as error:
        return [Problem(STORE_VARIABLE, f"is {address!r}; {error}")]
    return []
