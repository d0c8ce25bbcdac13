import pytest
import torch
from torch import nn

from kubetuner.config.sections.objective import EmaSettings
from kubetuner.errors import TrainingError
from kubetuner.training.averages import Averages, decay_after


@pytest.mark.parametrize(("taken", "decay"), [(1, 0.0), (2, 2 / 11), (10, 10 / 19), (91, 91 / 100), (2000, 0.995)])
def test_the_decay_rises(taken: int, decay: float) -> None:
    assert decay_after(EmaSettings(), taken) == pytest.approx(decay)


@pytest.mark.parametrize(("taken", "decay"), [(1, 0.0), (4, 0.0), (5, 0.9), (6, 0.9)])
def test_a_warmup_copies_and_then_keeps_one_decay(taken: int, decay: float) -> None:
    assert decay_after(EmaSettings(decay=0.9, warmup_steps=5), taken) == decay


def test_updates_come_at_their_interval_and_the_parameters_stay() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    averages = Averages(EmaSettings(decay=0.5, update_interval=2), {"weight": weight})
    seen = []
    for taken in range(1, 5):
        with torch.no_grad():
            weight.fill_(10.0 * taken)
        averages.update(taken)
        seen.append(averages.weights["weight"].item())
    # Step 2 keeps 2/11 of 1; step 4 keeps 4/13 of that.
    second = 2 / 11 * 1 + 9 / 11 * 20
    assert seen == pytest.approx([1.0, second, second, 4 / 13 * second + 9 / 13 * 40])
    assert weight.item() == 40.0

    averages.export()
    assert weight.item() == pytest.approx(seen[-1])


def test_averages_of_other_parameters_are_refused() -> None:
    averages = Averages(EmaSettings(), {"weight": nn.Parameter(torch.zeros(1))})
    with pytest.raises(TrainingError, match="averages of other parameters"):
        averages.load({})
