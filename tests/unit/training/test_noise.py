import pytest
import torch

from kubetuner.config.sections.objective import NoiseSettings
from kubetuner.training.objective.noise import draw_noise

SHAPE = (2, 4, 64, 64)


def test_plain_noise_is_unchanged_by_switches_that_are_off() -> None:
    noise = draw_noise(NoiseSettings(), SHAPE, 1, 2, 3)
    assert noise.input is noise.target
    assert torch.equal(noise.target, draw_noise(NoiseSettings(), SHAPE, 1, 2, 3).target)


def test_an_offset_is_the_same_for_a_whole_channel_of_input_and_target() -> None:
    plain = draw_noise(NoiseSettings(), SHAPE, 1, 0, 0).target
    noise = draw_noise(NoiseSettings(offset=0.5), SHAPE, 1, 0, 0)
    shift = noise.target - plain
    assert noise.input is noise.target
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand(SHAPE), rtol=0, atol=1e-6)
    assert len(set(shift[:, :, 0, 0].flatten().tolist())) == 8


def test_an_offset_has_its_deviation_and_its_share_of_batches() -> None:
    settings = NoiseSettings(offset=0.5, offset_probability=0.25)
    shape = (1, 4, 1, 1)
    shifts = torch.stack(
        [
            draw_noise(settings, shape, 0, step, 0).target - draw_noise(NoiseSettings(), shape, 0, step, 0).target
            for step in range(2000)
        ]
    ).flatten(1)
    hit = shifts.abs().sum(1) > 0
    assert hit.double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert shifts[hit].std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("step", "strength"), [(0, 0.1), (5, 0.05), (10, 0.0), (11, 0.0)])
def test_a_perturbation_goes_to_the_input_and_fades(step: int, strength: float) -> None:
    noise = draw_noise(NoiseSettings(perturbation=0.1, perturbation_steps=10), SHAPE, 1, step, 0)
    assert torch.equal(noise.target, draw_noise(NoiseSettings(), SHAPE, 1, step, 0).target)
    assert (noise.input - noise.target).std().item() == pytest.approx(strength, rel=0.02)


def test_without_steps_a_perturbation_stays() -> None:
    noise = draw_noise(NoiseSettings(perturbation=0.1), SHAPE, 1, 10_000, 0)
    assert (noise.input - noise.target).std().item() == pytest.approx(0.1, rel=0.02)
