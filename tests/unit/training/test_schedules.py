import pytest
import torch
from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup, get_scheduler

from kubetuner.config.sections.steps import DatasetSampling, ModelRef, TrainSection
from kubetuner.training.schedules import learning_rate

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_a_schedule_is_the_one_diffusers_calls_so(name: str, warmup: int) -> None:
    section = _section(lr_scheduler=name, lr_warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=section.learning_rate)
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=12)

    for step in range(13):
        assert learning_rate(section, step, 12) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        reference.step()


def test_polynomial_falls_from_the_top_to_lr_end() -> None:
    section = _section(lr_scheduler="polynomial", lr_warmup_steps=2, lr_end=1e-4, lr_power=2.0)

    rates = [learning_rate(section, step, 12) for step in (0, 1, 2, 7, 12, 20)]

    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 1e-4 + 9e-4 * 0.25, 1e-4, 1e-4])


@pytest.mark.parametrize("cycles", [1, 3])
def test_restarts_are_diffusers_hard_restarts(cycles: int) -> None:
    section = _section(lr_scheduler="cosine_with_restarts", lr_warmup_steps=4, lr_num_cycles=cycles)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=section.learning_rate)
    reference = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 4, 20, cycles)

    for step in range(21):
        assert learning_rate(section, step, 20) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        reference.step()


def test_a_sine_swings_from_the_middle_between_its_ends() -> None:
    section = _section(lr_scheduler="sine", lr_warmup_steps=2, lr_end=2e-4, lr_num_cycles=2)

    rates = [learning_rate(section, step, 10) for step in (0, 1, 2, 3, 4, 5, 6, 7, 10)]

    middle, top, low = 6e-4, 1e-3, 2e-4
    assert rates == pytest.approx([0.0, middle / 2, middle, top, middle, low, middle, top, middle])


def _section(**values: object) -> TrainSection:
    base = {
        "model": ModelRef(family="sana", path="x"),
        "model_type": "full",
        "datasets": (DatasetSampling(id="a"),),
        "learning_rate": 1e-3,
    }
    return TrainSection.model_validate(base | values)
