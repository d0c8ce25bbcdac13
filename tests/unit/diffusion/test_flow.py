import math

import pytest
import torch

from kubetuner.config.sections.objective import FlowSchedule
from kubetuner.diffusion.flow import AutoShift, FlowProcess

CLOSE = {"rtol": 0, "atol": 1e-3}  # Float32's steps near 1, seen through a logit.


def test_a_list_of_sigmas_is_drawn_from_and_not_shifted() -> None:
    process = FlowProcess(FlowSchedule(sigmas=(0.25, 0.5, 1.0), shift=3.0))
    sigmas = process.draw_levels((6000, 4, 8, 8), torch.Generator().manual_seed(0))
    assert sigmas.dtype == torch.float32
    assert [round((sigmas == sigma).double().mean().item(), 1) for sigma in (0.25, 0.5, 1.0)] == [0.3, 0.3, 0.3]


def test_a_list_in_turn_goes_on_where_the_micro_step_before_stopped() -> None:
    process = FlowProcess(FlowSchedule(sigmas=(0.1, 0.2, 0.3), in_turn=True))
    drawn = [process.draw_levels((2, 4, 8, 8), torch.Generator(), 2 * turn).tolist() for turn in range(3)]
    torch.testing.assert_close(drawn, [[0.1, 0.2], [0.3, 0.1], [0.2, 0.3]])


def test_noise_and_target() -> None:
    x, noise = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    sample = FlowProcess().add_noise(x, noise, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(sample.noisy_latents[0], 0.75 * x[0] + 0.25 * noise[0])
    torch.testing.assert_close(sample.noisy_latents[1], noise[1])
    assert torch.equal(sample.target, noise - x)
    assert sample.timesteps.tolist() == [250.0, 1000.0]


@pytest.mark.parametrize(("shift", "median"), [(1.0, 0.5), (3.0, 0.75), (0.0, 0.5)])
@pytest.mark.parametrize("density", ["logit_normal", "uniform"])
def test_shift_moves_the_median(density: str, shift: float, median: float) -> None:
    levels = FlowProcess(FlowSchedule(density=density, shift=shift)).draw_levels(
        (20_001, 4, 8, 8), torch.Generator().manual_seed(0)
    )
    assert levels.min() >= 0
    assert levels.max() <= 1
    assert abs(levels.median() - median) < 0.01


def test_sigmoid_scale_narrows_the_density() -> None:
    def spread(scale: float) -> float:
        levels = FlowProcess(FlowSchedule(sigmoid_scale=scale, shift=1.0)).draw_levels(
            (5000, 4, 8, 8), torch.Generator().manual_seed(0)
        )
        return float(levels.std())

    assert spread(0.1) < spread(1.0) / 4


@pytest.mark.parametrize(("offset", "scale"), [(1.0, 1.0), (-2.0, 0.5)])
def test_an_offset_moves_the_normal_values_before_they_are_scaled(offset: float, scale: float) -> None:
    schedule = FlowSchedule(sigmoid_scale=scale, shift=1.0)
    plain, moved = (
        FlowProcess(schedule, offset=one).draw_levels((20_001, 4, 8, 8), torch.Generator().manual_seed(0))
        for one in (0.0, offset)
    )
    torch.testing.assert_close(torch.logit(moved.double()), torch.logit(plain.double()) + scale * offset, **CLOSE)
    assert moved.median().item() == pytest.approx(1 / (1 + math.exp(-scale * offset)), abs=0.01)


def test_the_shift_comes_after_the_offset_and_no_other_density_has_one() -> None:
    def median(**settings: object) -> float:
        process = FlowProcess(FlowSchedule.model_validate(settings), offset=1.0)
        return process.draw_levels((20_001, 4, 8, 8), torch.Generator().manual_seed(0)).median().item()

    sigma = 1 / (1 + math.exp(-1.0))
    assert median(shift=3.0) == pytest.approx(3 * sigma / (1 + 2 * sigma), abs=0.01)
    assert median(density="uniform", shift=1.0) == pytest.approx(0.5, abs=0.01)


def test_eval_levels_are_bin_middles_and_not_shifted() -> None:
    assert FlowProcess(offset=2.0).eval_levels(4).tolist() == [0.125, 0.375, 0.625, 0.875]


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 2.0), (3.0, 1.0)])
def test_the_beta_density_has_its_moments(alpha: float, beta: float) -> None:
    schedule = FlowSchedule(density="beta", beta_alpha=alpha, beta_beta=beta, shift=0.0)
    levels = FlowProcess(schedule).draw_levels((50_000, 4, 8, 8), torch.Generator().manual_seed(0)).double()
    again = FlowProcess(schedule).draw_levels((50_000, 4, 8, 8), torch.Generator().manual_seed(0)).double()
    assert torch.equal(levels, again)
    assert levels.mean().item() == pytest.approx(alpha / (alpha + beta), abs=5e-3)
    variance = alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1))
    assert levels.var().item() == pytest.approx(variance, rel=0.03)


def test_an_auto_shift_follows_the_tokens() -> None:
    assert AutoShift().shift(16, 16) == pytest.approx(math.exp(0.5))
    assert AutoShift().shift(64, 64) == pytest.approx(math.exp(1.15))
    assert AutoShift(patch=2).shift(32, 32) == pytest.approx(math.exp(0.5))
    schedule = FlowSchedule(density="uniform", auto_shift=True)
    process = FlowProcess(schedule, AutoShift())
    median = process.draw_levels((20_001, 32, 64, 64), torch.Generator().manual_seed(0)).median()
    shift = math.exp(1.15)  # not schedule.shift
    assert median.item() == pytest.approx(shift / (1 + shift), abs=0.01)
