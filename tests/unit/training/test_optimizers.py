import sys

import pytest
import torch
from torch import nn

from kubetuner.config.load import load
from kubetuner.errors import InputError
from kubetuner.training.optimizers import make_optimizer, set_learning_rate

DATA = [{"id": "a", "instance_data_dir": "pictures"}]


def _section(**config):
    return load({"model_type": "full", "model_family": "sana", **config}, DATA).sections.train


@pytest.mark.parametrize(
    "name", ["torch-adamw", "torch-adafactor", "optimi-adamw", "optimi-lion", "optimi-stableadamw"]
)
def test_an_optimizer_minimises(name: str) -> None:
    weight = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = make_optimizer(_section(optimizer=name, learning_rate=0.05), [weight])
    for _ in range(200):
        optimizer.zero_grad()
        (weight - 1).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.ones(2), rtol=0, atol=0.2)


def test_prodigy_finds_its_own_rate() -> None:
    weight = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = make_optimizer(_section(optimizer="prodigy"), [weight])
    for _ in range(300):
        optimizer.zero_grad()
        (weight - 1).square().sum().backward()
        optimizer.step()
    assert optimizer.param_groups[0]["d"] > 1e-3
    torch.testing.assert_close(weight.detach(), torch.ones(2), rtol=0, atol=0.2)


def test_the_name_decides_the_class() -> None:
    made = {
        name: type(make_optimizer(_section(optimizer=name), [nn.Parameter(torch.zeros(1))]))
        for name in ("torch-adamw", "torch-adafactor", "optimi-adamw", "optimi-lion", "optimi-stableadamw", "prodigy")
    }
    assert [f"{kind.__module__.partition('.')[0]} {kind.__name__}" for kind in made.values()] == [
        "torch AdamW", "torch Adafactor", "optimi AdamW", "optimi Lion", "optimi StableAdamW", "prodigyopt Prodigy",
    ]  # fmt: skip


def test_one_step_of_lion_is_the_sign_of_the_mean_gradient() -> None:
    """Chen et al. 2023: w -= lr * (sign(beta1 * m + (1 - beta1) * g) + decay * w)."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    section = _section(optimizer="optimi-lion", learning_rate=0.1, optimizer_config="weight_decay=0.5")
    optimizer = make_optimizer(section, [weight])
    weight.grad = torch.tensor([0.3, 5.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0 - 0.1 * 1.5, -2.0 - 0.1 * (1 - 1.0)]))


def test_settings_reach_the_optimizer() -> None:
    section = _section(adam_beta2=0.95, optimizer_config="eps=1e-5,amsgrad=true")
    group = make_optimizer(section, [nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"], group["amsgrad"]) == ((0.9, 0.95), 1e-5, 0.01, True)


@pytest.mark.parametrize("name", ["bnb-adamw8bit-paged", "bnb-lion8bit", "ao-adamw8bit"])
def test_low_bit_optimizers_say_that_they_need_a_gpu(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} needs an NVIDIA GPU.*computes on cpu"):
        make_optimizer(_section(optimizer=name), [nn.Parameter(torch.zeros(1))])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimi", None)
    with pytest.raises(InputError, match=r"optimi-lion needs torch-optimi.*pip install torch-optimi"):
        make_optimizer(_section(optimizer="optimi-lion"), [nn.Parameter(torch.zeros(1))])


def test_a_rate_that_is_a_tensor_stays_one() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.5))
    kept = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is kept
    assert kept.item() == 0.25
