from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from kubetuner.config.sections.objective import RolloutSettings
from kubetuner.diffusion.epsilon import EpsilonProcess
from kubetuner.diffusion.flow import FlowProcess
from kubetuner.diffusion.process import NoiseProcess
from kubetuner.diffusion.rollout import depart, offsets, probability, roll_out

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ABAR = DDIMScheduler(**BETAS).alphas_cumprod
PROCESSES: dict[str, NoiseProcess] = {
    "epsilon": EpsilonProcess(ABAR),
    "v_prediction": EpsilonProcess(ABAR, prediction="v_prediction"),
    "flow": FlowProcess(),
}
SAMPLERS = [("euler", 1), ("dpm", 1), ("dpm", 2), ("unipc", 1), ("unipc", 2), ("unipc", 3)]


def settings(sampler: str = "unipc", order: int = 2, **more: Any) -> RolloutSettings:
    return RolloutSettings(max_offset=10, sampler=sampler, order=order, **more)


def drawn(seed: int) -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("step", "linear", "cosine"),
    # From 0.1 to 0.5 over the 8 steps after step 4: 0.1 + 0.4 p, and 0.1 + 0.4 (1 - cos(pi p)) / 2.
    [(0, 0.1, 0.1), (4, 0.1, 0.1), (6, 0.2, 0.1 + 0.4 * 0.1464466), (8, 0.3, 0.3), (12, 0.5, 0.5), (99, 0.5, 0.5)],
)
def test_the_ramp_by_hand(step, linear, cosine) -> None:
    ramp = settings(probability=0.1, final_probability=0.5, ramp_steps=8, ramp_start=4)
    assert probability(ramp, step) == pytest.approx(linear)
    assert probability(ramp.model_copy(update={"ramp_shape": "cosine"}), step) == pytest.approx(cosine)


def test_without_a_ramp_the_probability_stays() -> None:
    assert [probability(settings(probability=0.3, final_probability=0.3), step) for step in (0, 500)] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        # 11 equal parts of 0..1; then 10 u² and 10 (1 - u²) of u = 0, 0.25, 0.5, 0.75, 0.99, rounded.
        ("uniform", [0, 2, 5, 8, 10]),
        ("biased_early", [0, 1, 2, 6, 10]),
        ("biased_late", [10, 9, 8, 4, 0]),
    ],
)
def test_lengths_by_hand(strategy, expected) -> None:
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.99], dtype=torch.float64)
    assert offsets(settings(strategy=strategy), uniform).tolist() == expected


def test_room_ends_where_the_picture_does() -> None:
    levels = torch.tensor([0, 990, 999])
    assert EpsilonProcess(ABAR).room(levels).tolist() == [999, 9, 0]
    zero_snr = torch.cat([ABAR[:-1], torch.zeros(1)])
    assert EpsilonProcess(zero_snr, prediction="v_prediction").room(levels).tolist() == [998, 8, 0]
    assert FlowProcess().room(torch.tensor([0.0, 0.25, 0.9955, 0.9995, 1.0])).tolist() == [0, 749, 3, 0, 0]


def test_departures_are_noised_at_the_higher_level_and_come_down_by_a_timestep_each() -> None:
    x, noise = drawn(0), drawn(1)
    departure = depart(PROCESSES["epsilon"], x, noise, torch.tensor([10, 500, 7]), [2, 0, 3])
    assert departure is not None
    assert departure.levels.T.tolist() == [[12, 11, 10, 10], [500, 500, 500, 500], [10, 9, 8, 7]]
    assert [departure.moving(taken) for taken in range(4)] == [[0, 2], [0, 2], [2], []]
    expected = PROCESSES["epsilon"].add_noise(x, noise, torch.tensor([12, 500, 10])).noisy_latents
    assert torch.equal(departure.start, expected)
    flow = depart(PROCESSES["flow"], x, noise, torch.tensor([0.5, 0.25, 0.125]), [0, 1, 2])
    assert flow is not None
    torch.testing.assert_close(flow.levels.T, torch.tensor([[0.5] * 3, [0.251, 0.25, 0.25], [0.127, 0.126, 0.125]]))
    assert depart(PROCESSES["flow"], x, noise, torch.tensor([0.5, 0.25, 0.125]), [0, 0, 0]) is None


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize(("sampler", "order"), SAMPLERS)
def test_a_model_that_knows_the_noise_comes_back_to_the_exact_latents(kind, sampler, order) -> None:
    """Its clean latents are the same at every level, so each step is exact whatever solves it."""
    process, x, noise = PROCESSES[kind], drawn(0), drawn(1)
    levels = torch.tensor([0.3, 0.9, 0.5]) if kind == "flow" else torch.tensor([3, 900, 500])
    departure = depart(process, x, noise, levels, [4, 7, 0])
    assert departure is not None
    asked = []

    def ask(noisy: Tensor, timesteps: Tensor, rows: list[int]) -> Tensor:
        asked.append(rows)
        if kind != "v_prediction":
            return noise[rows] - x[rows] if kind == "flow" else noise[rows]
        signal, spread = (rate.float().reshape(-1, 1, 1, 1) for rate in process.rates(timesteps))
        return signal * noise[rows] - spread * x[rows]

    arrived = roll_out(settings(sampler, order), process, departure, ask)

    torch.testing.assert_close(arrived, process.add_noise(x, noise, levels).noisy_latents, atol=2e-5, rtol=1e-4)
    assert torch.equal(arrived[2], process.add_noise(x, noise, levels).noisy_latents[2])
    assert asked == [[0, 1]] * 4 + [[1]] * 3


def test_a_flow_by_hand() -> None:
    """v = x: Euler's step from sigma to sigma - 0.001 is x - 0.001 x, three of them leave 0.999³ of the start."""
    x, noise = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
    departure = depart(PROCESSES["flow"], x, noise, torch.tensor([0.5]), [3])
    assert departure is not None
    arrived = roll_out(settings("euler", 1), PROCESSES["flow"], departure, lambda noisy, _timesteps, _rows: noisy)
    assert departure.start.item() == pytest.approx(0.503 * 2)
    assert arrived.item() == pytest.approx(1.006 * 0.999**3, rel=1e-6)


@pytest.mark.parametrize(("sampler", "order"), SAMPLERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_rollout_is_what_diffusers_samplers_do(kind: str, sampler: str, order: int) -> None:
    steps, level = 6, 400
    process = PROCESSES[kind]
    departure = depart(process, drawn(0), drawn(1), torch.full((3,), level), [steps] * 3)
    assert departure is not None
    prediction = {"prediction_type": kind, **BETAS}
    scheduler: Any
    match sampler:
        case "euler":
            scheduler = DDIMScheduler(clip_sample=False, **prediction)
        case "dpm":
            scheduler = DPMSolverMultistepScheduler(solver_order=order, lower_order_final=False, **prediction)
        case _:
            scheduler = UniPCMultistepScheduler(solver_order=order, lower_order_final=False, **prediction)
    timesteps = torch.arange(level + steps, level - 1, -1)
    scheduler.timesteps = timesteps
    scheduler.num_inference_steps = 1000 if sampler == "euler" else steps
    if sampler != "euler":
        scheduler.sigmas = ((1 - ABAR[timesteps]) / ABAR[timesteps]).sqrt().double()
    expected = departure.start
    for timestep in timesteps[:-1]:
        expected = scheduler.step(_answer(expected, timestep), timestep, expected).prev_sample

    arrived = roll_out(
        settings(sampler, order), process, departure, lambda noisy, at, _rows: _answer(noisy, at.reshape(-1, 1, 1, 1))
    )

    torch.testing.assert_close(arrived, expected.float(), atol=1e-5, rtol=1e-5)
    moved = process.add_noise(drawn(0), drawn(1), torch.full((3,), level)).noisy_latents
    assert (arrived - moved).abs().max() > 1e-3


def _answer(noisy: Tensor, timestep: Tensor) -> Tensor:
    return torch.tanh(2 * noisy) * (0.5 + torch.sin(timestep / 3)).float() + 0.3 * noisy.float().square()
