"""``is_regularisation_data``: a LoRA learns to answer as its base does."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.objective import LossSettings, NoiseSettings, TimestepBias
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.loop import Job, train_denoiser
from tests.unit.training.conftest import RandomBatches, Setup

FAMILIES = ("pixart_sigma", "sdxl", "sana")
KINDS = {
    "dora": LoraSettings(rank=2, alpha=4.0, use_dora=True),
    "olora": LoraSettings(rank=2, alpha=2.0, dropout=0.0, init_type="olora"),
    "pissa": LoraSettings(rank=2, alpha=2.0, dropout=0.0, init_type="pissa"),
    "lokr": LoraSettings(algorithm="lokr", rank=10000, alpha=10000.0, factor=4, target_classes=("Attention",)),
    "loha": LoraSettings(algorithm="loha", rank=2, alpha=1.0, target_classes=("Attention",)),
}


def regularised(setup: Setup, family: str, **settings: object) -> Job:
    job = setup.job(family, RandomBatches(family), mixed_precision="no", **settings)
    return replace(job, objective=replace(job.objective, regularising=frozenset({"a"})))


def spoil(job: Job) -> None:
    """Give the adapter something to unlearn: a fresh LoRA changes nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in job.trained().values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_is_the_base_models_own_answer(setup: Setup, family: str) -> None:
    job = regularised(setup, family)
    base = setup.job(family, RandomBatches(family), lora=None, model_type="full", mixed_precision="no")
    question = job.question(0, 0)
    assert question.regularising
    fresh = job.objective.losses(job.denoiser.eval(), question)
    assert fresh.tolist() == pytest.approx([0.0, 0.0], abs=1e-9)

    spoil(job)
    with torch.no_grad():
        expected = base.objective.answer(base.denoiser.eval(), question)
        answer = job.objective.answer(job.denoiser, question)
    error = (answer - expected).square().flatten(1).mean(1)
    assert job.objective.losses(job.denoiser, question).tolist() == pytest.approx(error.tolist(), rel=1e-4)
    assert min(error.tolist()) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_compared_with_the_published_base(setup: Setup, kind: str) -> None:
    """OLoRA and PiSSA move a part of the base into the adapter, which is part of the base's answer."""
    job = regularised(setup, "sana", lora=KINDS[kind])
    base = setup.job("sana", RandomBatches("sana"), lora=None, model_type="full", mixed_precision="no")
    question = job.question(0, 0)
    spoil(job)
    before = {name: value.detach().clone() for name, value in job.trained().items()}
    with torch.no_grad():
        expected = base.objective.answer(base.denoiser.eval(), question)
        answer = job.objective.answer(job.denoiser.eval(), question)
    error = (answer - expected).square().flatten(1).mean(1)

    losses = job.objective.losses(job.denoiser, question)

    assert losses.tolist() == pytest.approx(error.tolist(), rel=1e-3)
    assert min(error.tolist()) > 1e-6
    losses.mean().backward()
    assert job.trained().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in job.trained().items())
    assert any(bool(value.grad.any()) for value in job.trained().values() if value.grad is not None)


def test_the_base_models_answer_is_scored_as_the_section_says(setup: Setup) -> None:
    chosen = {
        "loss": LossSettings(type="huber", snr_gamma=5.0),
        "noise": NoiseSettings(offset=0.1, perturbation=0.2),
        "timestep_bias": TimestepBias(strategy="earlier", multiplier=1000.0),
    }
    job = regularised(setup, "sdxl", **chosen)
    question = job.question(0, 0)
    spoil(job)
    job.denoiser.eval()
    base = setup.job("sdxl", RandomBatches("sdxl"), lora=None, model_type="full", mixed_precision="no", **chosen)
    with torch.no_grad():
        target = base.objective.answer(base.denoiser.eval(), question)
        answer = job.objective.answer(job.denoiser, question)
    expected = job.objective.process.loss(answer, replace(question.noisy, target=target))
    losses = job.objective.losses(job.denoiser, question)
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert question.noisy.weights.tolist() != [1.0, 1.0]
    assert losses.tolist() != pytest.approx((answer - target).square().flatten(1).mean(1).tolist(), rel=1e-2)


def test_the_adapter_learns_and_stays_trainable(setup: Setup, tmp_path: Path) -> None:
    job = regularised(setup, "sana", max_train_steps=30, max_grad_norm=0.0)
    spoil(job)
    names = set(job.trained())
    metrics: list[Mapping[str, float]] = []

    train_denoiser(job, Checkpoints(tmp_path, "key", 1), lambda values, _step: metrics.append(values))

    losses = [values["regularisation_loss"] for values in metrics]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert set(job.trained()) == names
    assert job.denoiser.training


def test_other_datasets_keep_their_target(setup: Setup, tmp_path: Path) -> None:
    job = setup.job("sana", RandomBatches("sana"), mixed_precision="no", max_train_steps=1)
    metrics: list[Mapping[str, float]] = []
    train_denoiser(job, Checkpoints(tmp_path, "key", 1), lambda values, _step: metrics.append(values))
    assert "regularisation_loss" not in metrics[0]
    assert metrics[0]["train_loss"] > 0.1
