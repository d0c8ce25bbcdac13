import pytest
import torch

from kubetuner.diffusion.flow import FlowProcess


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
    levels = FlowProcess(density, shift=shift).draw_levels(20_001, torch.Generator().manual_seed(0))
    assert levels.min() >= 0
    assert levels.max() <= 1
    assert abs(levels.median() - median) < 0.01


def test_sigmoid_scale_narrows_the_density() -> None:
    def spread(scale: float) -> float:
        levels = FlowProcess(sigmoid_scale=scale, shift=1.0).draw_levels(5000, torch.Generator().manual_seed(0))
        return float(levels.std())

    assert spread(0.1) < spread(1.0) / 4


def test_eval_levels_are_bin_middles_and_not_shifted() -> None:
    assert FlowProcess(shift=3.0).eval_levels(4).tolist() == [0.125, 0.375, 0.625, 0.875]
