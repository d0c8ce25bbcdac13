import json
import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kubetuner.config.sections.objective import (
    EmaSettings,
    FlowSchedule,
    LossSettings,
    NoiseSettings,
    ReflexSettings,
    RolloutSettings,
    TimestepBias,
)
from kubetuner.errors import TrainingError
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.interruption import TerminatedError
from kubetuner.training.loop import Job, train_denoiser
from kubetuner.training.randomness import derive_seed
from tests.unit.training.conftest import ALL, RandomBatches, Setup

FAMILIES = ("pixart_sigma", "sdxl", "sana")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model_type", ["full", "lora"])
def test_a_resumed_run_has_the_same_losses_and_weights_bit_for_bit(
    setup: Setup, tmp_path: Path, family: str, model_type: str
) -> None:
    settings = {"model_type": model_type, "gradient_accumulation_steps": 2, "checkpoint_step_interval": 3}
    whole = setup.job(family, RandomBatches(family), **settings)
    expected = _train(whole, tmp_path / "whole")
    interrupted = setup.job(family, RandomBatches(family, act=terminate_at(3)), **settings)
    with pytest.raises(TerminatedError, match=r"after step 4 of 6.*run again to resume"):
        _train(interrupted, tmp_path / "parts")
    batches = RandomBatches(family)
    resumed = setup.job(family, batches, **settings)

    losses = _train(resumed, tmp_path / "parts")

    assert losses == {step: expected[step] for step in (5, 6)}
    assert batches.asked == [(4, 0), (4, 1), (5, 0), (5, 1)]
    for name, weight in whole.trained().items():
        assert torch.equal(weight, resumed.trained()[name]), name


LOSS = LossSettings(type="huber", snr_gamma=5.0)
NOISE = NoiseSettings(offset=0.1, offset_probability=0.5, perturbation=0.1, perturbation_steps=5)
BIAS = TimestepBias(strategy="later", multiplier=3.0)
RAMP = RolloutSettings(max_offset=3, probability=0.4, final_probability=1.0, ramp_steps=4, ramp_start=1)


@pytest.mark.parametrize(
    ("family", "switches"),
    [
        ("pixart_sigma", {"loss": LOSS, "noise": NOISE, "timestep_bias": BIAS}),
        ("pixart_sigma", {"rollout": RAMP}),
        ("sdxl", {"rollout": RAMP.model_copy(update={"sampler": "dpm"}), "loss": LossSettings(diff2flow=True)}),
        ("sana", {"rollout": RAMP.model_copy(update={"reflex": ReflexSettings(), "ramp_shape": "cosine"})}),
        ("sana", {"flow": FlowSchedule(density="beta", auto_shift=True), "lr_scheduler": "sine"}),
        ("sana", {"ema": EmaSettings(decay=0.5, update_interval=2), "lr_scheduler": "cosine_with_restarts"}),
        ("sana", {"ema": EmaSettings(warmup_steps=3, device="accelerator"), "nonfinite_loss": "skip"}),
        *(("sana", {"optimizer": name}) for name in ("torch-adafactor", "optimi-adamw", "optimi-lion")),
        ("sana", {"optimizer": "optimi-stableadamw", "max_grad_norm": 0.0}),
        ("sana", {"optimizer": "prodigy", "learning_rate": 1.0, "optimizer_options": {"d0": 1e-4}}),
    ],
    ids=str,
)
def test_every_switch_resumes_bit_for_bit(
    setup: Setup, tmp_path: Path, family: str, switches: dict[str, object]
) -> None:
    settings = {"model_type": "lora", "checkpoint_step_interval": 3, **switches}
    plain = setup.job(family, RandomBatches(family))
    whole = setup.job(family, RandomBatches(family), **settings)
    expected = _train(whole, tmp_path / "whole")
    with pytest.raises(TerminatedError):
        _train(setup.job(family, RandomBatches(family, act=terminate_at(3)), **settings), tmp_path / "parts")
    resumed = setup.job(family, RandomBatches(family), **settings)

    assert _train(resumed, tmp_path / "parts") == {step: expected[step] for step in (5, 6)}

    for name, weight in whole.trained().items():
        assert torch.equal(weight, resumed.trained()[name]), name
    _train(plain, tmp_path / "plain")
    assert any(not torch.equal(weight, whole.trained()[name]) for name, weight in plain.trained().items())


def test_averages_are_what_comes_out(setup: Setup, tmp_path: Path) -> None:
    settings = {"mixed_precision": "no", "max_train_steps": 3, "checkpoint_step_interval": 1}
    plain = setup.job("sana", RandomBatches("sana"), **settings)
    _train(plain, tmp_path / "plain")
    weights = [load_file(tmp_path / f"plain/key/checkpoint-{step}/weights.safetensors") for step in (1, 2, 3)]
    metrics: list[Mapping[str, float]] = []
    job = setup.job("sana", RandomBatches("sana"), ema=EmaSettings(decay=0.995), **settings)

    train_denoiser(job, Checkpoints(tmp_path / "ema", "key", 5), lambda values, _step: metrics.append(values))

    # Decay 0, then (1 + 1) / (10 + 1), then (1 + 2) / (10 + 2).
    assert [values["ema_decay_value"] for values in metrics] == pytest.approx([0.0, 2 / 11, 3 / 12])
    for name, value in job.trained().items():
        second = 2 / 11 * weights[0][name] + 9 / 11 * weights[1][name]
        torch.testing.assert_close(value.detach(), 0.25 * second + 0.75 * weights[2][name])


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


@pytest.mark.parametrize("scheduler", ["constant_with_warmup", "cosine", "polynomial"])
def test_the_schedule_decides_how_far_a_step_goes(setup: Setup, tmp_path: Path, scheduler: str) -> None:
    """Without decay AdamW's first step moves every weight by the learning rate."""
    settings = {"lr_scheduler": scheduler, "lr_warmup_steps": 4, "adam_weight_decay": 0.0, "mixed_precision": "no"}
    job = setup.job("sana", RandomBatches("sana"), **settings, checkpoint_step_interval=1)
    before = {name: weight.detach().clone() for name, weight in job.trained().items()}
    outcome = train_denoiser(job, Checkpoints(tmp_path, "key", 9), lambda _values, _step: None)
    after = load_file(tmp_path / "key/checkpoint-1/weights.safetensors")
    farthest = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert farthest == pytest.approx(outcome.points[0].lr, rel=1e-3)
    assert outcome.points[0].lr < job.section.learning_rate / 2


@pytest.mark.parametrize(("method", "logged"), [("norm", "grad_norm"), ("value", "grad_absmax")])
def test_metrics_carry_the_gradient_before_clipping(setup: Setup, tmp_path: Path, method: str, logged: str) -> None:
    job = setup.job("sana", RandomBatches("sana"), grad_clip_method=method, max_grad_norm=1e-9, max_train_steps=2)
    metrics: list[Mapping[str, float]] = []

    train_denoiser(job, Checkpoints(tmp_path, "key", 1), lambda values, _step: metrics.append(values))

    assert set(metrics[0]) == {"train_loss", "learning_rate", "epoch", logged}
    assert metrics[0][logged] > 1e-6
    assert metrics[1]["epoch"] == pytest.approx(0.2)


def test_a_loss_that_is_not_finite_names_the_sample_and_keeps_its_batch(setup: Setup, tmp_path: Path) -> None:
    settings = {"checkpoint_step_interval": 1, "gradient_accumulation_steps": 2}
    job = setup.job("sana", RandomBatches("sana", broken_step=2), **settings)

    with pytest.raises(TrainingError, match=r"step 3 is not finite for a/second\.png, a/second\.png: .*step-3"):
        _train(job, tmp_path)

    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    batch = load_file(tmp_path / "key-nonfinite/step-3/batch.safetensors")
    for micro in range(2):
        for name, tensor in job.question(2, micro).named().items():
            assert torch.equal(batch[f"{micro}.{name}"].nan_to_num(7.0), tensor.nan_to_num(7.0)), name
    position = json.loads((tmp_path / "key-nonfinite/step-3/position.json").read_text())
    assert position["losses"][1] == "a/second.png: nan"
    assert position["regularising"] == [False] * 4
    assert position["seeds"][1]["noise"] == derive_seed(job.section.seed, "noise", 2, 1)


def test_a_step_that_is_not_finite_can_be_skipped(
    setup: Setup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"nonfinite_loss": "skip", "checkpoint_step_interval": 1}
    job = setup.job("sana", RandomBatches("sana", broken_step=2), **settings)
    with caplog.at_level(logging.WARNING):
        losses = _train(job, tmp_path)

    assert list(losses) == [1, 2, 4, 5, 6]
    assert "a/second.png" in caplog.text
    before, after = (load_file(tmp_path / f"key/checkpoint-{step}/weights.safetensors") for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "key-nonfinite/step-3/batch.safetensors").is_file()
    assert all(weight.isfinite().all() for weight in job.trained().values())


@pytest.mark.parametrize(("steps", "message"), [(12, "10 steps in a row"), (3, "none of the 3 steps")])
def test_skipping_has_an_end(setup: Setup, tmp_path: Path, steps: int, message: str) -> None:
    batches = RandomBatches("sana", broken_step=ALL)
    job = setup.job("sana", batches, nonfinite_loss="skip", max_train_steps=steps)

    with pytest.raises(TrainingError, match=message):
        _train(job, tmp_path)


def test_the_first_and_each_interval_step_are_logged(setup: Setup, tmp_path: Path) -> None:
    job = setup.job("sana", RandomBatches("sana"), log_step_interval=3)

    assert list(_train(job, tmp_path)) == [1, 3, 6]


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        # The job's epochs are micro-steps / 10: steps of 2 of them end at 0.2, 0.4, ..., 2.0.
        ({"checkpoint_epoch_interval": 1}, [5, 10]),
        ({"checkpoint_epoch_interval": 2}, [10]),
        ({"checkpoint_epoch_interval": 1, "checkpoint_step_interval": 4}, [4, 5, 8, 10]),
        # Steps of 3 micro-steps pass the first epoch's end with the fourth, the second's with the seventh.
        ({"checkpoint_epoch_interval": 1, "gradient_accumulation_steps": 3}, [4, 7, 10]),
    ],
)
def test_checkpoints_by_epochs(setup: Setup, tmp_path: Path, settings: dict[str, object], taken: list[int]) -> None:
    defaults = {"gradient_accumulation_steps": 2, "max_train_steps": 10}
    _train(setup.job("sana", RandomBatches("sana"), **{**defaults, **settings}), tmp_path)

    assert sorted(int(path.name.split("-")[1]) for path in (tmp_path / "key").iterdir()) == taken


def test_levels_in_turn_follow_the_micro_steps(setup: Setup) -> None:
    flow = FlowSchedule(sigmas=(0.1, 0.2, 0.3, 0.4, 0.5), in_turn=True)
    job = setup.job("sana", RandomBatches("sana", sizes=(2, 2)), flow=flow, gradient_accumulation_steps=2)
    timesteps = [job.question(step, micro).noisy.timesteps.tolist() for step in (0, 1) for micro in (0, 1)]
    assert [round(value) for pair in timesteps for value in pair] == [100, 200, 300, 400, 500, 100, 200, 300]


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


def terminate_at(stop: int):  # type: ignore[no-untyped-def]
    def act(step: int) -> None:
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    return act
