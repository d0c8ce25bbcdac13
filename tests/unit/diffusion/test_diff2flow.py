import pytest
import torch

from kubetuner.config.sections.objective import LossSettings
from kubetuner.diffusion.endpoints import clean_latents, flow, predicted_noise
from kubetuner.diffusion.epsilon import EpsilonProcess

FLOW = LossSettings(diff2flow=True)
# abar 0.64: noisy = 0.8 x + 0.6 noise.
PROCESSES = {
    kind: EpsilonProcess(torch.tensor([0.64]), prediction=kind, scoring=FLOW) for kind in ("epsilon", "v_prediction")
}


def one(value: float) -> torch.Tensor:
    return torch.full((1, 1, 2, 2), value)


@pytest.mark.parametrize(
    ("kind", "prediction", "clean", "noise"),
    [
        # x = 1 and noise = -1 give 0.2. Noise -0.5 said: (0.2 + 0.6 * 0.5) / 0.8 = 0.625, flow -0.5 - 0.625.
        ("epsilon", -0.5, 0.625, -0.5),
        # v = 0.8 * -1 - 0.6 * 1 = -1.4. v -1 said: 0.8 * 0.2 + 0.6 * 1 = 0.76 and 0.8 * -1 + 0.6 * 0.2 = -0.68.
        ("v_prediction", -1.0, 0.76, -0.68),
    ],
)
def test_the_flow_by_hand(kind, prediction, clean, noise) -> None:
    process = PROCESSES[kind]
    sample = process.add_noise(one(1.0), one(-1.0), torch.tensor([0]))
    assert sample.noisy_latents.mean().item() == pytest.approx(0.2)
    assert sample.target.mean().item() == -2
    rates = process.rates(sample.timesteps)
    said = (kind, one(prediction), sample.noisy_latents, *rates)
    torch.testing.assert_close(clean_latents(*said), one(clean))
    torch.testing.assert_close(predicted_noise(*said), one(noise))
    torch.testing.assert_close(flow(*said), one(noise - clean))
    loss = process.loss(one(prediction), sample)
    assert loss.item() == pytest.approx((noise - clean + 2) ** 2)


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_right_answer_has_no_loss(kind) -> None:
    abar = torch.tensor([0.999, 0.5, 0.0047])
    x, noise, levels = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.arange(3)
    native = EpsilonProcess(abar, prediction=kind).add_noise(x, noise, levels).target
    process = EpsilonProcess(abar, prediction=kind, scoring=FLOW)
    sample = process.add_noise(x, noise, levels)
    torch.testing.assert_close(sample.target, noise - x)
    assert process.loss(native, sample).max() < 1e-9


@pytest.mark.parametrize(("kind", "factor"), [("epsilon", 1.4 / 0.8), ("v_prediction", 1.4)])
def test_it_weighs_levels_as_the_docstring_says(kind, factor) -> None:
    plain = EpsilonProcess(torch.tensor([0.64]), prediction=kind)
    x, noise, levels = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([0, 0])
    said = torch.randn(2, 1, 4, 4)
    expected = plain.loss(said, plain.add_noise(x, noise, levels)) * factor**2
    found = PROCESSES[kind].loss(said, PROCESSES[kind].add_noise(x, noise, levels))
    torch.testing.assert_close(found, expected)
