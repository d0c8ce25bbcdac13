"""Batches of several sizes in one step, and datasets with noise levels of their own."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from kubetuner.config.compilation import CompileSettings
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.objective import FlowSchedule
from kubetuner.config.sections.steps import DatasetSampling
from kubetuner.errors import TrainingError
from kubetuner.families import load_family
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.interruption import TerminatedError
from kubetuner.training.loop import Job, train_denoiser
from tests.unit.training.conftest import RandomBatches, Setup
from tests.unit.training.test_loop import terminate_at

SIZES = (2, 3)  # Of dataset a and of dataset b.
TWO = {"gradient_accumulation_steps": 2, "mixed_precision": "no"}
PLAIN = LoraSettings(rank=2, alpha=4.0, dropout=0.0)
FULL = {"model_type": "full", "lora": None}


@pytest.mark.parametrize("family", ["pixart_sigma", "sdxl", "sana"])
def test_every_batch_counts_the_same_in_gradient_and_log(setup: Setup, tmp_path: Path, family: str) -> None:
    """The mean of the batches' means, as in SimpleTuner: a sample of a small batch counts for more."""
    settings = FULL | TWO | {"max_train_steps": 1, "max_grad_norm": 0.0}
    job = setup.job(family, RandomBatches(family, sizes=SIZES), **settings)
    losses = [job.objective.losses(job.denoiser, job.question(0, micro)) for micro in range(2)]
    assert [len(loss) for loss in losses] == [2, 3]
    expected = (losses[0].mean() + losses[1].mean()) / 2
    expected.backward()
    gradients = [value.grad for value in job.trained().values() if value.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    job.denoiser.zero_grad()

    (values,) = log_of(job, tmp_path)

    assert values["train_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert values["train_loss"] != pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert values["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_the_regularisation_loss_is_that_of_its_batches(setup: Setup, tmp_path: Path) -> None:
    settings = TWO | {"lora": PLAIN, "gradient_accumulation_steps": 3, "max_train_steps": 1}
    job = setup.job("sana", RandomBatches("sana", sizes=(1, 2, 3)), **settings)
    job = replace(job, objective=replace(job.objective, regularising=frozenset({"b"})))
    with torch.no_grad():
        for value in job.trained().values():
            value.add_(0.1)
        means = [job.objective.losses(job.denoiser, job.question(0, micro)).mean().item() for micro in range(3)]

    (values,) = log_of(job, tmp_path)

    assert values["regularisation_loss"] == pytest.approx((means[1] + means[2]) / 2, rel=1e-4)
    assert values["train_loss"] == pytest.approx(sum(means) / 3, rel=1e-4)


def test_levels_in_turn_count_samples(setup: Setup) -> None:
    flow = FlowSchedule(sigmas=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), in_turn=True)
    job = setup.job("sana", RandomBatches("sana", sizes=(3, 1)), flow=flow, gradient_accumulation_steps=2)
    timesteps = [job.question(step, micro).noisy.timesteps.tolist() for step in (0, 1) for micro in (0, 1)]
    assert [[round(one) for one in batch] for batch in timesteps] == [[100, 200, 300], [400], [500, 600, 100], [200]]


def test_an_offset_moves_the_levels_of_its_dataset_alone(setup: Setup) -> None:
    plain = setup.job("sana", RandomBatches("sana", sizes=SIZES), **TWO)
    process = load_family("sana").noise_process(
        plain.section.model, plain.section.process(DatasetSampling(id="b", timestep_sampling_offset=1.5))
    )
    job = replace(plain, objective=replace(plain.objective, drawing={"b": process}))

    for step in range(4):
        for name, tensor in plain.question(step, 0).named().items():
            assert torch.equal(tensor, job.question(step, 0).named()[name]), name
        before, after = (one.question(step, 1) for one in (plain, job))
        levels = [one.noisy.timesteps.double() / 1000 for one in (before, after)]
        unshifted = [sigma / (3 - 2 * sigma) for sigma in levels]  # The default shift is 3.
        moved = torch.logit(unshifted[1]) - torch.logit(unshifted[0])
        torch.testing.assert_close(moved, torch.full_like(moved, 1.5), rtol=0, atol=1e-3)
        assert torch.equal(before.noisy.target, after.noisy.target)  # The same noise.


def test_a_sample_that_is_not_finite_is_named_in_a_batch_of_any_size(setup: Setup, tmp_path: Path) -> None:
    job = setup.job("sana", RandomBatches("sana", broken_step=0, sizes=SIZES), **TWO)

    with pytest.raises(TrainingError, match=r"not finite for a/second\.png, b/second\.png: "):
        log_of(job, tmp_path)

    position = json.loads((tmp_path / "key-nonfinite/step-1/position.json").read_text())
    names = [line.partition(": ")[0] for line in position["losses"]]
    assert names == ["a/first.png", "a/second.png", "b/first.png", "b/second.png", "b/third.png"]


@pytest.mark.parametrize("family", ["sdxl", "sana"])
def test_a_resumed_run_is_the_same_bit_for_bit(setup: Setup, tmp_path: Path, family: str) -> None:
    settings = {**TWO, "mixed_precision": "bf16", "checkpoint_step_interval": 3}
    whole = setup.job(family, RandomBatches(family, sizes=SIZES), **settings)
    expected = log_of(whole, tmp_path / "whole")
    stopped = setup.job(family, RandomBatches(family, sizes=SIZES, act=terminate_at(3)), **settings)
    with pytest.raises(TerminatedError):
        log_of(stopped, tmp_path / "parts")
    resumed = setup.job(family, RandomBatches(family, sizes=SIZES), **settings)

    assert log_of(resumed, tmp_path / "parts") == expected[4:]
    for name, weight in whole.trained().items():
        assert torch.equal(weight, resumed.trained()[name]), name


# Torch's own, while it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script.* is deprecated:DeprecationWarning")
def test_each_size_is_a_shape_of_its_own_for_the_compiler(setup: Setup, tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    settings = TWO | {"lora": PLAIN, "compilation": CompileSettings(backend="eager")}
    job = setup.job("sana", RandomBatches("sana", sizes=SIZES), **settings)

    graphs = train_denoiser(job, Checkpoints(tmp_path, "key", 5), lambda _values, _step: None).graphs

    assert graphs is not None
    assert (graphs.shapes, graphs.made, graphs.unexpected) == (2, 4, 0)  # First block and others, of each.


def log_of(job: Job, folder: Path) -> list[Mapping[str, float]]:
    """Train and return what was logged of each step."""
    logged: list[Mapping[str, float]] = []
    train_denoiser(job, Checkpoints(folder, "key", 5), lambda values, _step: logged.append(values))
    return logged
