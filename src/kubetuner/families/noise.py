"""Noise processes from a base's scheduler configuration, and the same changes to it in its pipeline."""

import inspect
from typing import Any, cast

from torch import Tensor

from kubetuner.config.sections.objective import Prediction, ProcessSettings
from kubetuner.config.sections.steps import ModelRef
from kubetuner.diffusion.epsilon import EpsilonProcess
from kubetuner.diffusion.flow import AutoShift
from kubetuner.errors import InputError
from kubetuner.families.loading import load_config

_BETAS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def epsilon_process(ref: ModelRef, settings: ProcessSettings) -> EpsilonProcess:
    """The noise process of the base's scheduler, whatever sampler it names: its betas and prediction type.

    Raises:
        InputError: The scheduler's prediction type is none that the family trains.
    """
    from diffusers import DDPMScheduler

    config = load_config(DDPMScheduler, ref, "scheduler") | ref.scheduler.settings()
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(
            f"{ref.path}/scheduler: prediction_type is {prediction!r}; {ref.family} trains 'epsilon' or "
            "'v_prediction'. Check that the model belongs to this model_family."
        )
    if prediction == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise InputError(
            f"{ref.path}/scheduler: rescale_betas_zero_snr is true and prediction_type is 'epsilon'; at the last "
            "timestep such a model is told nothing about the picture. Set prediction_type to v_prediction."
        )
    scheduler = DDPMScheduler(**{name: config[name] for name in _BETAS if name in config})
    alphas: Tensor = scheduler.alphas_cumprod
    return EpsilonProcess(
        alphas, settings.segmented, cast(Prediction, prediction), bias=settings.bias, scoring=settings.loss
    )


def auto_shift(ref: ModelRef, patch: int) -> AutoShift:
    """The shift that follows the resolution, by the base's scheduler where it says more than ``AutoShift``."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = load_config(FlowMatchEulerDiscreteScheduler, ref, "scheduler")
    known = AutoShift(patch)
    return AutoShift(
        patch,
        base_tokens=config.get("base_image_seq_len", known.base_tokens),
        max_tokens=config.get("max_image_seq_len", known.max_tokens),
        base_mu=config.get("base_shift", known.base_mu),
        max_mu=config.get("max_shift", known.max_mu),
    )


def change_scheduler(pipeline: Any, ref: ModelRef) -> None:
    """Make the pipeline draw, and be saved, as its denoiser was trained.

    Raises:
        InputError: Its sampler cannot.
    """
    changes = ref.scheduler.settings()
    if not changes:
        return
    sampler = type(pipeline.scheduler)
    unknown = changes.keys() - inspect.signature(sampler).parameters.keys()
    if unknown:
        raise InputError(
            f"{ref.path}/scheduler: its sampler {sampler.__name__} has no {', '.join(sorted(unknown))}; "
            "use a base whose scheduler is EulerDiscreteScheduler or DDIMScheduler, or remove the key."
        )
    pipeline.scheduler = sampler.from_config(pipeline.scheduler.config, **changes)
