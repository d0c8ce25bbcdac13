import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from kubetuner.errors import TrainingError
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.interruption import TerminatedError
from kubetuner.training.loop import Job, train_denoiser
from tests.unit.training.conftest import RandomBatches, Setup

FAMILIES = ("pixart_sigma", "sdxl", "sana")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model_type", ["full", "lora"])
def test_a_resumed_run_has_the_same_losses_and_weights_bit_for_bit(
    setup: Setup, tmp_path: Path, family: str, model_type: str
) -> None:
    settings = {"model_type": model_type, "gradient_accumulation_steps": 2, "checkpoint_step_interval": 3}
    whole = setup.job(family, RandomBatches(family), **settings)
    expected = _train(whole, tmp_path / "whole")
    interrupted = setup.job(family, RandomBatches(family, act=_terminate_at(3)), **settings)
    with pytest.raises(TerminatedError, match=r"after step 4 of 6.*run again to resume"):
        _train(interrupted, tmp_path / "parts")
    batches = RandomBatches(family)
    resumed = setup.job(family, batches, **settings)

    losses = _train(resumed, tmp_path / "parts")

    assert losses == {step: expected[step] for step in (5, 6)}
    assert batches.asked == [(4, 0), (4, 1), (5, 0), (5, 1)]
    for name, weight in whole.trained().items():
        assert torch.equal(weight, resumed.trained()[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_training_learns_a_fixed_batch(setup: Setup, tmp_path: Path, family: str) -> None:
    class SameBatch(RandomBatches):
        def batch(self, step: int, micro: int):  # type: ignore[no-untyped-def]
            return super().batch(0, 0)

    job = setup.job(family, SameBatch(family), max_train_steps=40, model_type="full", mixed_precision="no", lora=None)
    losses = list(_train(job, tmp_path).values())

    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_accumulation_is_the_mean_over_micro_steps(setup: Setup, tmp_path: Path) -> None:
    settings = {"model_type": "full", "mixed_precision": "no", "max_train_steps": 1, "max_grad_norm": 0.0}
    job = setup.job("sana", RandomBatches("sana"), gradient_accumulation_steps=2, **settings)
    questions = [job.question(0, micro) for micro in range(2)]
    with torch.no_grad():
        expected = torch.cat([job.objective.losses(job.denoiser, question) for question in questions]).mean()

    assert _train(job, tmp_path)[1] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("method", "logged"), [("norm", "grad_norm"), ("value", "grad_absmax")])
def test_metrics_carry_the_gradient_before_clipping(setup: Setup, tmp_path: Path, method: str, logged: str) -> None:
    job = setup.job("sana", RandomBatches("sana"), grad_clip_method=method, max_grad_norm=1e-9, max_train_steps=2)
    metrics: list[Mapping[str, float]] = []

    train_denoiser(job, Checkpoints(tmp_path, "key", 1), lambda values, _step: metrics.append(values))

    assert set(metrics[0]) == {"train_loss", "learning_rate", "epoch", logged}
    assert metrics[0][logged] > 1e-6
    assert metrics[1]["epoch"] == pytest.approx(0.2)


def test_a_loss_that_is_not_finite_names_the_sample_and_saves_nothing(setup: Setup, tmp_path: Path) -> None:
    job = setup.job("sana", RandomBatches("sana", broken_step=2), checkpoint_step_interval=1)

    with pytest.raises(TrainingError, match=r"step 3 is not finite for a/second\.png: "):
        _train(job, tmp_path)

    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_the_first_and_each_interval_step_are_logged(setup: Setup, tmp_path: Path) -> None:
    job = setup.job("sana", RandomBatches("sana"), log_step_interval=3)

    assert list(_train(job, tmp_path)) == [1, 3, 6]


def test_sigterm_is_given_back(setup: Setup, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    _train(setup.job("sana", RandomBatches("sana"), max_train_steps=1), tmp_path)

    assert signal.getsignal(signal.SIGTERM) is before


def _train(job: Job, folder: Path) -> dict[int, float]:
    losses: dict[int, float] = {}

    def log(values: Mapping[str, float], step: int) -> None:
        losses[step] = values["train_loss"]

    outcome = train_denoiser(job, Checkpoints(folder, "key", 5), log)
    assert [point.loss for point in outcome.points][-len(losses) :] == list(losses.values())
    return losses


def _terminate_at(stop: int):  # type: ignore[no-untyped-def]
    def act(step: int) -> None:
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    return act
