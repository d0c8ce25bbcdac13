import math
from dataclasses import replace

import pytest
import torch

from kubetuner.config.sections.objective import LossSettings, TimestepBias
from kubetuner.diffusion.epsilon import EpsilonProcess, timestep_weights
from kubetuner.diffusion.flow import FlowProcess
from kubetuner.diffusion.losses import huber_turns, sample_losses, snr_weights

SNR = torch.tensor([0.0, 1.0, 5.0, 50.0])


@pytest.mark.parametrize(
    ("loss", "prediction", "expected"),
    [
        (LossSettings(), "epsilon", [1, 1, 1, 1]),
        (LossSettings(snr_weight=0.5), "v_prediction", [0.5] * 4),
        (LossSettings(snr_gamma=5), "epsilon", [1, 1, 1, 0.1]),
        (LossSettings(snr_gamma=5), "v_prediction", [0, 1 / 2, 5 / 6, 5 / 51]),
        # gamma = 4: gamma / (SNR + gamma), and SNR * gamma / ((SNR + gamma) * (SNR + 1)).
        (LossSettings(soft_sigma_data=0.5), "epsilon", [1, 4 / 5, 4 / 9, 4 / 54]),
        (LossSettings(soft_sigma_data=0.5), "v_prediction", [0, 4 / 10, 20 / 54, 200 / (54 * 51)]),
    ],
)
def test_snr_weights(loss, prediction, expected) -> None:
    torch.testing.assert_close(snr_weights(loss, SNR, prediction), torch.tensor(expected, dtype=torch.float32))


def test_soft_min_snr_is_k_diffusions_weight_of_a_normalised_target() -> None:
    """Its v of unit-variance data is EDM's normalised target, weighted (sigma sd)² / (sigma² + sd²)² with sd = 1."""
    sigma2 = 1 / SNR[1:]
    torch.testing.assert_close(
        snr_weights(LossSettings(soft_sigma_data=1.0), SNR[1:], "v_prediction"), sigma2 / (sigma2 + 1).square()
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.1, 0.1, 0.1]), ("exponential", [1.0, 0.1**0.5, 0.1]), ("snr", [1.0, 0.9 / 4 + 0.1, 0.1])],
)
def test_huber_schedules(schedule, expected) -> None:
    progress, ratio = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, math.inf])
    turns = huber_turns(LossSettings(huber_schedule=schedule), progress, ratio)
    torch.testing.assert_close(turns, torch.tensor(expected))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("l2", 1.0), ("huber", 0.2 * (math.sqrt(1.01) - 0.1)), ("smooth_l1", 2 * (math.sqrt(1.01) - 0.1))],
)
def test_a_difference_of_one(kind, expected) -> None:
    one, two = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 2.0)
    found = sample_losses(LossSettings(type=kind), two, one, torch.tensor([1.0, 0.5]), torch.tensor([0.1, 0.1]))
    torch.testing.assert_close(found, torch.tensor([expected, expected / 2]))


@pytest.mark.parametrize(
    ("bias", "share"),
    [
        (TimestepBias(strategy="earlier", portion=0.25, multiplier=3.0), 3 / 6),
        (TimestepBias(strategy="later", portion=0.25, multiplier=3.0), 1 / 6),
        (TimestepBias(strategy="range", begin=0, end=250, multiplier=0.5), 0.5 / 3.5),
        (TimestepBias(), 0.25),
    ],
)
@pytest.mark.parametrize("segmented", [True, False])
def test_a_bias_is_what_the_levels_show(bias, share, segmented) -> None:
    process = EpsilonProcess(torch.linspace(0.999, 0.005, 1000), segmented=segmented, bias=bias)
    levels = process.draw_levels((40_000, 4, 8, 8), torch.Generator().manual_seed(0))
    assert (levels < 250).double().mean().item() == pytest.approx(share, abs=1e-4 if segmented else 0.01)


def test_one_segment_does_not_hide_a_bias() -> None:
    bias = TimestepBias(strategy="later", portion=0.25, multiplier=9.0)  # 9 of 12 parts lie in the last quarter
    process = EpsilonProcess(torch.linspace(0.999, 0.005, 1000), bias=bias)
    levels = process.draw_levels((4, 4, 8, 8), torch.Generator().manual_seed(0))
    assert (levels >= 750).sum() == 3


def test_weights_of_timesteps() -> None:
    weights = timestep_weights(TimestepBias(strategy="later", portion=0.2, multiplier=4.0), 10)
    assert weights.tolist() == [1.0] * 8 + [4.0] * 2


def test_flow_losses_can_be_robust() -> None:
    process = FlowProcess(scoring=LossSettings(type="huber", huber_schedule="constant"))
    x = torch.zeros(1, 1, 1, 1)
    sample = process.add_noise(x, torch.ones_like(x), torch.tensor([1.0]))
    assert process.loss(x, sample).item() == pytest.approx(0.2 * (math.sqrt(1.01) - 0.1))


@pytest.mark.parametrize(
    ("kind", "full"),
    [("l2", 1.0), ("huber", 0.2 * (math.sqrt(1.01) - 0.1)), ("smooth_l1", 2 * (math.sqrt(1.01) - 0.1))],
)
def test_a_mask_multiplies_each_error_and_the_mean_is_over_the_whole_area(kind, full) -> None:
    """An error of 1 in 2 channels of 2x2; weights 1, 0.5, 0.25 and 0 let 1.75 / 4 of it through."""
    target = torch.zeros(3, 2, 2, 2)
    mask = torch.tensor([[1.0, 0.5], [0.25, 0.0]]).expand(3, 1, 2, 2).clone()
    mask[1], mask[2] = 1, 0
    losses = sample_losses(
        LossSettings(type=kind), target + 1, target, torch.tensor([2.0, 1.0, 1.0]), torch.full((3,), 0.1), mask
    )
    torch.testing.assert_close(losses, torch.tensor([2 * full * 1.75 / 4, full, 0.0]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("scoring", [LossSettings(), LossSettings(type="huber"), LossSettings(snr_gamma=5)])
def test_every_process_applies_the_mask(prediction, scoring) -> None:
    """With an error in the masked half alone the loss is 0; in the other half alone it is that of no mask."""
    alphas = torch.linspace(0.99, 0.01, 1000)
    if prediction == "flow":
        process, levels = FlowProcess(scoring=scoring.model_copy(update={"snr_gamma": 0.0})), torch.tensor([0.3, 0.8])
    else:
        process = EpsilonProcess(alphas, prediction=prediction, scoring=scoring)
        levels = torch.tensor([300, 800])
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    noisy = process.add_noise(latents, noise, levels)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    masked = replace(noisy, emphasis=mask)
    inside, outside = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    inside[..., :4], outside[..., 4:] = 0.5, 0.5
    assert process.loss(noisy.target + outside, masked).tolist() == [0.0, 0.0]
    assert torch.equal(process.loss(noisy.target + inside, masked), process.loss(noisy.target + inside, noisy))
    assert process.loss(noisy.target + inside, noisy).min() > 0
