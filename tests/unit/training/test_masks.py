"""Masked loss in the loop: which masks are used, and what they change."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kubetuner.config.sections.objective import LossSettings, NoiseSettings
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.interruption import TerminatedError
from kubetuner.training.loop import Job, train_denoiser
from kubetuner.training.objective.masks import draw_masks
from tests.unit.training.conftest import RandomBatches, Setup

FAMILIES = ("pixart_sigma", "sdxl", "sana")


def left_half() -> torch.Tensor:
    """The first sample's left half counts, of the second everything."""
    masks = torch.ones(2, 1, 8, 8)
    masks[0, ..., 4:] = 0
    return masks


def test_a_draw_depends_on_seed_step_and_micro_step_alone() -> None:
    masks = torch.full((64, 1, 2, 2), 0.25)
    drawn = draw_masks(0.5, masks, 42, 3, 1)
    torch.manual_seed(0)
    assert torch.equal(draw_masks(0.5, masks, 42, 3, 1), drawn)
    used = (drawn.flatten(1) == 0.25).all(1)
    assert ((drawn.flatten(1) == 1).all(1) == ~used).all()
    for seed, step, micro in ((43, 3, 1), (42, 4, 1), (42, 3, 0)):
        assert not torch.equal(draw_masks(0.5, masks, seed, step, micro), drawn)


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_so_many_masks_are_used(probability: float, share: float) -> None:
    drawn = torch.cat([draw_masks(probability, torch.zeros(4, 1, 1, 1), 1, step, 0) for step in range(500)])
    assert (drawn == 0).float().mean().item() == pytest.approx(share, abs=0.03 if 0 < share < 1 else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_mixes_samples_with_and_without_a_mask(setup: Setup, family: str) -> None:
    settings = {"mixed_precision": "no", "loss": LossSettings(type="huber")}
    plain = setup.job(family, RandomBatches(family), **settings)
    job = setup.job(family, RandomBatches(family, masks=left_half()), **settings)
    plain.denoiser.eval()
    with torch.no_grad():
        full = plain.objective.losses(plain.denoiser, plain.question(0, 0))
        found = job.objective.losses(plain.denoiser, job.question(0, 0))
        noisy = plain.question(0, 0).noisy
        wrong = plain.objective.answer(plain.denoiser, plain.question(0, 0)) - noisy.target
    assert found[1] == full[1]
    c = noisy.turns[0]
    errors = 2 * c * ((wrong[0].square() + c.square()).sqrt() - c)
    assert found[0].item() == pytest.approx(
        (errors[..., :4].sum() / errors.numel() * noisy.weights[0]).item(), rel=1e-5
    )


def test_what_is_masked_out_teaches_nothing(setup: Setup) -> None:
    """Latents and noise under the mask are input, but whatever the target is there, gradients stay the same."""
    job = setup.job("sdxl", RandomBatches("sdxl", masks=left_half().flip(0)), mixed_precision="no")
    job.denoiser.eval()
    with torch.no_grad():
        for parameter in job.trained().values():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    question = job.question(0, 0)
    other = question.noisy.target.clone()
    other[1, ..., 4:] += 100
    gradients = []
    for target in (question.noisy.target, other):
        job.denoiser.zero_grad()
        asked = replace(question, noisy=replace(question.noisy, target=target))
        job.objective.losses(job.denoiser, asked).mean().backward()  # type: ignore[no-untyped-call]
        gradients.append([value.grad for value in job.trained().values() if value.grad is not None])
    assert len(gradients[0]) == len(job.trained())
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_the_base_models_answer_is_masked_too(setup: Setup) -> None:
    """Regularisation data may have masks, and a perturbed input keeps them."""
    noise = NoiseSettings(perturbation=0.1)
    masks = torch.zeros(2, 1, 8, 8)
    job = setup.job("sana", RandomBatches("sana", masks=masks), mixed_precision="no", noise=noise)
    job = replace(job, objective=replace(job.objective, regularising=frozenset({"a"})))
    with torch.no_grad():
        for parameter in job.trained().values():
            parameter.normal_(std=0.2)
    question = job.question(0, 0)
    assert question.regularising
    assert job.objective.losses(job.denoiser, question).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("family", ["pixart_sigma", "sana"])
def test_a_resumed_run_draws_the_same_masks(setup: Setup, tmp_path: Path, family: str) -> None:
    settings = {"masked_loss_probability": 0.5, "checkpoint_step_interval": 3, "gradient_accumulation_steps": 2}

    def stop(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = setup.job(family, RandomBatches(family, masks=left_half()), **settings)
    expected = _train(whole, tmp_path / "whole")
    with pytest.raises(TerminatedError):
        _train(setup.job(family, RandomBatches(family, masks=left_half(), act=stop), **settings), tmp_path / "parts")
    resumed = setup.job(family, RandomBatches(family, masks=left_half()), **settings)
    assert _train(resumed, tmp_path / "parts") == expected
    assert all(torch.equal(value, resumed.trained()[name]) for name, value in whole.trained().items())
    for probability in (0.0, 1.0):
        other = setup.job(
            family, RandomBatches(family, masks=left_half()), **settings | {"masked_loss_probability": probability}
        )
        assert _train(other, tmp_path / str(probability)) != expected


def _train(job: Job, folder: Path) -> list[float]:
    return [point.loss for point in train_denoiser(job, Checkpoints(folder, "key", 5), lambda *_: None).points]
