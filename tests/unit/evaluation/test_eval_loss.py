from dataclasses import replace

import pytest
import torch
from torch import nn

from kubetuner.config.sections.objective import ProcessSettings
from kubetuner.config.sections.steps import ModelRef
from kubetuner.evaluation.eval_loss import BANDS, Measurement, band_of, evaluation_loss, noise_seed
from kubetuner.evaluation.held_out import HeldOut
from kubetuner.families import load_family

CPU = torch.device("cpu")
FAMILY = load_family("pixart_sigma")


@pytest.fixture
def measurement(base: ModelRef) -> Measurement:
    return Measurement(FAMILY, FAMILY.noise_process(base, ProcessSettings()), 6, bf16=False)


@pytest.fixture
def denoiser(base: ModelRef) -> nn.Module:
    return FAMILY.load_denoiser(base, CPU, torch.float32)


def test_the_same_model_gives_the_same_loss_whatever_the_random_state(
    measurement: Measurement, denoiser: nn.Module, held_out: HeldOut
) -> None:
    torch.manual_seed(1)
    first = evaluation_loss(measurement, denoiser, held_out, "")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = evaluation_loss(measurement, denoiser, held_out, "")

    assert first == again
    assert torch.equal(state, torch.get_rng_state()), "the global random state is left alone"


def test_the_mean_is_the_plain_mean_over_samples_and_levels_done_by_hand(
    measurement: Measurement, denoiser: nn.Module, held_out: HeldOut
) -> None:
    errors = []
    for sample in held_out.samples:
        for rank, level in enumerate(measurement.process.eval_levels(6).sort().values):
            seed = noise_seed("rings", sample.row.sample, rank)
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
            noisy = measurement.process.add_noise(sample.latents[None], noise, level[None])
            conditioning = FAMILY.collate([sample.text], held_out.null, [sample.row])
            with torch.no_grad():
                prediction = FAMILY.predict(denoiser.eval(), noisy.noisy_latents, noisy.timesteps, conditioning)
            errors.append((prediction - noisy.target).square().mean().item())

    result = evaluation_loss(measurement, denoiser, held_out, "")

    assert result.mean == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert result.samples == 2
    assert result.levels[0].loss == pytest.approx((errors[0] + errors[6]) / 2, rel=1e-5)


def test_dropout_is_off_and_the_models_mode_is_given_back(
    measurement: Measurement, denoiser: nn.Module, held_out: HeldOut
) -> None:
    for module in denoiser.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    denoiser.train()

    first = evaluation_loss(measurement, denoiser, held_out, "")

    assert denoiser.training
    assert first == evaluation_loss(measurement, denoiser, held_out, "")


def test_bands_and_datasets_average_to_the_mean(
    measurement: Measurement, denoiser: nn.Module, held_out: HeldOut
) -> None:
    result = evaluation_loss(measurement, denoiser, held_out, "")

    assert tuple(result.bands) == BANDS
    assert sum(result.bands.values()) / 3 == pytest.approx(result.mean)
    assert result.datasets == {"rings": pytest.approx(result.mean)}
    assert [level.level for level in result.levels] == sorted(level.level for level in result.levels)


def test_a_changed_model_gives_another_loss_and_a_broken_one_is_not_finite(
    measurement: Measurement, denoiser: nn.Module, held_out: HeldOut
) -> None:
    before = evaluation_loss(measurement, denoiser, held_out, "")
    with torch.no_grad():
        next(iter(denoiser.parameters())).mul_(2)
        after = evaluation_loss(measurement, denoiser, held_out, "")
        next(iter(denoiser.parameters())).fill_(torch.nan)
    broken = evaluation_loss(measurement, denoiser, held_out, "")

    assert before.mean != after.mean
    assert after.finite
    assert not broken.finite


def test_bfloat16_is_near_float32(measurement: Measurement, denoiser: nn.Module, held_out: HeldOut) -> None:
    exact = evaluation_loss(measurement, denoiser, held_out, "")
    rough = evaluation_loss(replace(measurement, bf16=True), denoiser, held_out, "")

    assert rough.mean == pytest.approx(exact.mean, rel=0.02)
    assert rough.mean != exact.mean


def test_seeds_are_fixed_for_all_time_and_differ_by_each_part() -> None:
    assert noise_seed("rings", "rings/a.png", 0) == 8602112555620695817
    assert len({noise_seed(d, s, k) for d in ("a", "b") for s in ("a", "b") for k in range(5)}) == 20


@pytest.mark.parametrize(("count", "expected"), [(1, ["middle"]), (2, ["low", "high"]), (3, list(BANDS)), (28, None)])
def test_bands_split_levels_evenly(count: int, expected: list[str] | None) -> None:
    bands = [band_of(rank, count) for rank in range(count)]

    if expected is not None:
        assert bands == expected
    assert max(map(bands.count, set(bands))) - min(map(bands.count, set(bands))) <= 1
