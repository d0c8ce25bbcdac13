import torch

from kubetuner.diffusion.epsilon import EpsilonProcess

ABAR = torch.linspace(0.999, 0.005, 1000)


def test_segmented_levels_take_one_timestep_from_each_segment() -> None:
    levels = EpsilonProcess(ABAR).draw_levels((8, 4, 8, 8), torch.Generator().manual_seed(0))
    assert levels.dtype == torch.int64
    assert (levels // 125).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_plain_levels_cover_the_whole_range_evenly() -> None:
    levels = EpsilonProcess(ABAR, segmented=False).draw_levels((20_000, 4, 8, 8), torch.Generator().manual_seed(0))
    assert levels.min() == 0
    assert levels.max() == 999
    assert abs(levels.double().mean() - 499.5) < 8


def test_levels_are_the_generators() -> None:
    process = EpsilonProcess(ABAR)
    first, again = (process.draw_levels((4, 4, 8, 8), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)


def test_more_samples_than_timesteps() -> None:
    levels = EpsilonProcess(ABAR[:3]).draw_levels((9, 4, 8, 8), torch.Generator().manual_seed(0))
    assert levels.tolist() == [2, 2, 2, 1, 1, 1, 0, 0, 0]


def test_eval_levels_are_bin_middles() -> None:
    assert EpsilonProcess(ABAR).eval_levels(4).tolist() == [125, 375, 625, 875]


def test_noise_and_targets() -> None:
    x, noise, levels = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([0, 999])
    for prediction in ("epsilon", "v_prediction"):
        sample = EpsilonProcess(ABAR, prediction=prediction).add_noise(x, noise, levels)
        for row, level in enumerate(levels):
            a, b = ABAR[level].sqrt(), (1 - ABAR[level]).sqrt()
            torch.testing.assert_close(sample.noisy_latents[row], a * x[row] + b * noise[row])
            target = noise[row] if prediction == "epsilon" else a * noise[row] - b * x[row]
            torch.testing.assert_close(sample.target[row], target)
        assert torch.equal(sample.timesteps, levels)


def test_loss_is_per_sample_in_float32() -> None:
    process = EpsilonProcess(ABAR)
    sample = process.add_noise(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.tensor([1, 2]))
    prediction = torch.tensor([1.0, 2.0], dtype=torch.bfloat16).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
    loss = process.loss(prediction, sample)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [1.0, 4.0]
