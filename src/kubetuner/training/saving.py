"""Saving what was trained, and making sure that it loads as what was trained."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kubetuner.artifacts import PIPELINE_FOLDER
from kubetuner.errors import TrainingError
from kubetuner.training.denoiser import load_base, prepare_denoiser
from kubetuner.training.distributed.sharding import collect
from kubetuner.training.loop import Job
from kubetuner.training.objective import Question

_ALLOWED_OF_EFFECT = 0.05
_ALLOWED_ROUNDING = {True: 2e-2, False: 1e-4}
"""Largest share of the prediction's norm that rounding may explain, with and without bf16."""


def gathered(job: Job) -> Job:
    """The job with a denoiser that is not sharded, in the first process; all processes must ask."""
    if not job.processes.sharded:
        return job
    trained = job.trained()
    weights = collect(trained, trained, keep=job.processes.first)
    if not job.processes.first:
        return job
    whole = replace(job, denoiser=prepare_denoiser(job.section, job.objective.family, job.device))
    with torch.no_grad():
        for name, parameter in whole.trained().items():
            parameter.copy_(weights[name])
    return whole


def save_pipeline(job: Job, out: Path) -> Path:
    """Write the whole pipeline with the trained denoiser to ``out/pipeline``, all or nothing."""
    final, temporary = out / PIPELINE_FOLDER, out / f".{PIPELINE_FOLDER}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    job.denoiser.eval()
    cpu = torch.device("cpu")  # Text encoders and VAE are only copied: they need no place on the GPU.
    pipeline = job.objective.family.load_pipeline(job.section.model, job.denoiser, cpu)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    return final


def save_adapter(job: Job, folder: Path) -> None:
    """Write the adapter to ``folder``, load it onto a fresh base, and compare what both predict.

    Raises:
        TrainingError: The loaded adapter does not predict what the trained one does.
    """
    family = job.objective.family
    question = job.question(0, 0).on(job.device)
    trained = _predict(job, job.denoiser, question)
    family.save_adapter(folder, job.denoiser)
    fresh = load_base(job.section, family, job.device)
    base = _predict(job, fresh, question)
    loaded = _predict(job, family.load_adapter(fresh, folder), question)
    difference, effect = (trained - loaded).norm(), (trained - base).norm()
    rounding = _ALLOWED_ROUNDING[job.objective.mixed_precision] * trained.norm()
    if not difference <= torch.maximum(_ALLOWED_OF_EFFECT * effect, rounding):
        raise TrainingError(
            f"the adapter saved in {folder} does not load as it was trained: predictions differ by {difference:.3g} "
            f"where the adapter changes them by {effect:.3g}; this is a bug, please report it with your config"
        )


@torch.no_grad()
def _predict(job: Job, denoiser: nn.Module, question: Question) -> Tensor:
    denoiser.eval()
    return job.objective.answer(denoiser, question)
