"""Scheduled sampling in the loop: what the denoiser is asked, and what of its answers the loss sees."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kubetuner.config.sections.objective import LossSettings, ReflexSettings, RolloutSettings
from kubetuner.diffusion.reflex import emphasis, turning
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.loop import Job, train_denoiser
from kubetuner.training.objective import Question
from kubetuner.training.objective.rollout import draw_steps
from tests.unit.training.conftest import RandomBatches, Setup

FAMILIES = ("pixart_sigma", "sdxl", "sana")
ALWAYS = RolloutSettings(max_offset=3, probability=1.0, final_probability=1.0)
EULER = ALWAYS.model_copy(update={"sampler": "euler", "order": 1, "strategy": "biased_late"})
FLOW = LossSettings(diff2flow=True)


class SameBatch(RandomBatches):
    def batch(self, step: int, micro: int):  # type: ignore[no-untyped-def]
        return super().batch(0, 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "idle",
    [
        ALWAYS.model_copy(update={"probability": 0.0, "final_probability": 0.0, "reflex": ReflexSettings()}),
        ALWAYS.model_copy(update={"probability": 0.0, "ramp_steps": 5, "ramp_start": 100}),
    ],
    ids=["probability-zero", "before-the-ramp"],
)
def test_a_probability_of_zero_is_the_plain_objective_bit_for_bit(
    setup: Setup, tmp_path: Path, family: str, idle: RolloutSettings
) -> None:
    plain, rolling = (
        setup.job(family, RandomBatches(family), max_train_steps=3, rollout=rollout) for rollout in (None, idle)
    )
    assert _losses(plain, tmp_path / "plain") == _losses(rolling, tmp_path / "rolling")
    for name, weight in plain.trained().items():
        assert torch.equal(weight, rolling.trained()[name])


def test_reflexflow_without_weights_is_the_plain_loss_of_what_was_rolled_out(setup: Setup) -> None:
    """Zero alpha and beta1, and beta2 1."""
    off = ReflexSettings(alpha=0.0, drift_weight=0.0)
    found = []
    for reflex in (None, off, ReflexSettings()):
        job = _full(setup, "sana", rollout=ALWAYS.model_copy(update={"reflex": reflex}))
        found.append(job.objective.losses(job.denoiser, _moving_question(job)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_is_drawn_step_by_step_and_the_target_stays(setup: Setup, family: str) -> None:
    """Each sample by itself, with Euler's step written out: the ends of its path at the next level."""
    job = _full(setup, family, rollout=EULER)
    objective, process = job.objective, job.objective.process
    question = _moving_question(job)
    assert question.departure is not None
    plain = replace(job.objective, rollout=None).question(job.batches.batch(0, 0), 0, 0)
    assert torch.equal(question.noisy.target, plain.noisy.target)
    latents = question.departure.start.clone()
    with torch.no_grad():
        for row, steps in enumerate(question.departure.steps):
            for taken in range(steps):
                here, there = question.departure.levels[taken : taken + 2, row : row + 1]
                alone = _alone(question, row, latents[row : row + 1], process.timesteps(here))
                said = objective.answer(job.denoiser, alone)
                clean = process.clean(said, latents[row : row + 1], here)
                (signal, spread), (next_signal, next_spread) = process.rates(here), process.rates(there)
                noise = (latents[row : row + 1] - signal.float() * clean) / spread.float()
                latents[row : row + 1] = next_signal.float() * clean + next_spread.float() * noise
        drifted = replace(question.noisy, noisy_latents=latents)
        answer = objective.answer(job.denoiser, replace(question, noisy=drifted))
        expected = process.loss(answer, drifted)

        losses = objective.losses(job.denoiser, question)

    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert (latents - question.noisy.noisy_latents).abs().max() > 1e-4


def test_each_sample_costs_its_own_steps_and_dropout_is_off_meanwhile(setup: Setup) -> None:
    job = setup.job("sana", RandomBatches("sana"), rollout=EULER)
    question = _moving_question(job)
    assert question.departure is not None
    asked: list[tuple[int, bool, bool]] = []

    def note(module: torch.nn.Module, _inputs: object, output: object) -> None:
        assert isinstance(output, tuple)
        asked.append((len(output[0]), module.training, torch.is_grad_enabled()))

    handle = job.denoiser.train().register_forward_hook(note)
    job.objective.losses(job.denoiser, question)
    handle.remove()

    *rolled, last = asked
    assert sum(rows for rows, _, _ in rolled) == sum(question.departure.steps) > 2
    assert {state for _, *states in rolled for state in states} == {False}
    assert last == (2, True, True)
    assert job.denoiser.training


def test_reflexflows_terms_by_their_definition(setup: Setup) -> None:
    reflex = ReflexSettings(alpha=0.5, drift_weight=3.0, loss_weight=2.0)
    job = _full(setup, "sana", rollout=EULER.model_copy(update={"reflex": reflex}))
    objective = job.objective
    question = _moving_question(job, stays=1)
    batch = job.batches.batch(0, 0)
    bare = replace(objective, rollout=EULER)
    seen: list[Tensor] = []
    handle = job.denoiser.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        plain = bare.losses(job.denoiser, question)
        handle.remove()
        drifted = replace(question.noisy, noisy_latents=seen[-1])
        exact_answer, answer = (
            objective.answer(job.denoiser, replace(question, noisy=noisy)) for noisy in (question.noisy, drifted)
        )
        losses = objective.losses(job.denoiser, question)

    errors = emphasis(0.5, exact_answer, answer) * (answer - question.noisy.target).square()
    away = turning(answer, drifted.noisy_latents, batch.latents)
    assert losses[0].item() == pytest.approx(2 * errors[0].mean().item() + 3 * away[0].item(), rel=1e-4)
    assert losses[1].item() == pytest.approx(plain[1].item(), rel=1e-5)  # It did not move.


def test_regularisation_data_are_never_rolled_out(setup: Setup) -> None:
    job = setup.job("sana", RandomBatches("sana"), rollout=ALWAYS)
    objective = replace(job.objective, regularising=frozenset({"a"}))
    assert all(objective.question(job.batches.batch(step, 0), step, 0).departure is None for step in range(5))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_regularisation_and_diff2flow_agree_on_the_space_of_the_target(setup: Setup, kind: str) -> None:
    """A fresh adapter answers as its base does."""
    job = setup.job("sdxl", RandomBatches("sdxl"), mixed_precision="no", loss=FLOW)
    process = replace(job.objective.process, prediction=kind)  # type: ignore[type-var]
    objective = replace(job.objective, process=process, regularising=frozenset({"a"}))
    question = objective.question(job.batches.batch(0, 0), 0, 0)
    assert question.regularising
    assert objective.losses(job.denoiser.eval(), question).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_what_is_drawn_depends_on_the_position_alone() -> None:
    room = torch.tensor([999, 999, 999, 1, 0])
    drawn = {
        position: draw_steps(ALWAYS.model_copy(update={"max_offset": 50}), room, 42, *position)
        for position in [(0, 0), (0, 1), (1, 0), (7, 3)]
    }
    assert len({tuple(steps) for steps in drawn.values()}) == 4
    for position, steps in drawn.items():
        assert draw_steps(ALWAYS.model_copy(update={"max_offset": 50}), room, 42, *position) == steps
        assert steps[3] <= 1
        assert steps[4] == 0


def test_the_probability_is_logged(setup: Setup, tmp_path: Path) -> None:
    ramp = ALWAYS.model_copy(update={"probability": 0.0, "final_probability": 0.5, "ramp_steps": 2})
    job = setup.job("sana", RandomBatches("sana"), rollout=ramp, max_train_steps=3)
    metrics: list[Mapping[str, float]] = []

    train_denoiser(job, Checkpoints(tmp_path, "key", 1), lambda values, _step: metrics.append(values))

    assert [values["rollout_probability"] for values in metrics] == [0.0, 0.25, 0.5]


def test_the_share_of_samples_follows_the_ramp() -> None:
    ramp = ALWAYS.model_copy(
        update={"probability": 0.0, "final_probability": 0.8, "ramp_steps": 100, "strategy": "biased_late"}
    )
    room = torch.full((4000,), 999)
    for step, share in ((0, 0.0), (50, 0.4), (100, 0.8)):
        # biased_late draws 0 of 3 where 3 (1 - u²) < 1/2: u above sqrt(5/6), 8.7 % of the chosen ones.
        moved = sum(steps > 0 for steps in draw_steps(ramp, room, 1, step, 0)) / 4000
        assert moved == pytest.approx(share * (5 / 6) ** 0.5, abs=0.03)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("pixart_sigma", {"rollout": ALWAYS}),
        ("sdxl", {"rollout": ALWAYS}),
        ("sana", {"rollout": ALWAYS.model_copy(update={"reflex": ReflexSettings()})}),
        ("pixart_sigma", {"loss": FLOW}),
        ("sdxl", {"loss": FLOW, "rollout": ALWAYS}),
    ],
    ids=["pixart-rollout", "sdxl-rollout", "sana-reflex", "pixart-diff2flow", "sdxl-both"],
)
def test_training_learns_a_fixed_batch(setup: Setup, tmp_path: Path, family: str, settings: dict[str, object]) -> None:
    """Measured with the plain objective, which is what the saved pipeline and the evaluation loss go by."""
    job = _full(setup, family, SameBatch(family), max_train_steps=30, **settings)
    plain = _full(setup, family, SameBatch(family)).objective
    before = _held_loss(job, plain)

    losses = list(_losses(job, tmp_path).values())

    assert all(torch.tensor(losses).isfinite())
    assert _held_loss(job, plain) < 0.8 * before


def _full(setup: Setup, family: str, batches: RandomBatches | None = None, **settings: object) -> Job:
    job = setup.job(
        family, batches or RandomBatches(family), model_type="full", lora=None, mixed_precision="no", **settings
    )
    job.denoiser.eval()
    return job


def _moving_question(job: Job, stays: int | None = None) -> Question:
    """A question of which both samples move, or all but one."""
    for step in range(50):
        question = job.objective.question(job.batches.batch(0, 0), step, 0)
        departure = question.departure
        if departure is not None and [row for row, steps in enumerate(departure.steps) if steps == 0] == (
            [] if stays is None else [stays]
        ):
            return question
    raise AssertionError("no such question")


def _alone(question: Question, row: int, noisy: Tensor, timesteps: Tensor) -> Question:
    some = question.of([row])
    return replace(some, noisy=replace(some.noisy, noisy_latents=noisy, timesteps=timesteps))


@torch.no_grad()
def _held_loss(job: Job, plain: object) -> float:
    job.denoiser.eval()
    losses = [
        plain.losses(job.denoiser, plain.question(job.batches.batch(0, 0), step, 0))  # type: ignore[attr-defined]
        for step in range(1000, 1008)
    ]
    return float(torch.cat(losses).mean())


def _losses(job: Job, folder: Path) -> dict[int, float]:
    losses: dict[int, float] = {}

    def log(values: Mapping[str, float], step: int) -> None:
        losses[step] = values["train_loss"]

    train_denoiser(job, Checkpoints(folder, "key", 5), log)
    return losses
