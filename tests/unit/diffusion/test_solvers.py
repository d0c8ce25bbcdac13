import math

import pytest
import torch

from kubetuner.diffusion.solvers import Path, step_from

# sigma 1/2, 1/3, 1/5 of a flow: signal / spread is 1, 2, 4, so lambda is 0, ln 2, 2 ln 2: each step halves e^-lambda.
SPREAD = torch.tensor([[1 / 2], [1 / 3], [1 / 5]], dtype=torch.float64)
PATH = Path(1 - SPREAD, SPREAD)
LAMBDA = [0.0, math.log(2), 2 * math.log(2)]


@pytest.mark.parametrize(
    ("place", "order", "corrects", "kept", "weights"),
    [
        # (1/5) / (1/3) of the latents, and signal' * (1 - 1/2) = 4/5 * 1/2 of the prediction.
        pytest.param(1, 1, False, 3 / 5, {1: 2 / 5}, id="euler"),
        # The point before lies a whole step behind: its share is 1/2 / -1, so 2/5 * (1 + 1/2) and 2/5 * -1/2.
        pytest.param(1, 2, False, 3 / 5, {1: 3 / 5, 0: -1 / 5}, id="second-order"),
        # (1/3) / (1/2), 2/3 * 1/2, and half of it for each end: the trapezoid.
        pytest.param(0, 1, True, 2 / 3, {0: 1 / 6, 1: 1 / 6}, id="corrected"),
    ],
)
def test_steps_computed_by_hand(place, order, corrects, kept, weights) -> None:
    step = step_from(PATH, place, order, corrects)
    assert step.kept.item() == pytest.approx(kept)
    assert {at: weight.item() for at, weight in step.weights.items()} == pytest.approx(weights)


def test_a_corrected_step_of_second_order_is_exact_for_a_parabola() -> None:
    """The exact solution adds spread' times the integral of e^lambda * clean(lambda), here over ln 2 .. 2 ln 2."""
    step = step_from(PATH, 1, 2, corrects=True)
    integrals = {
        0: lambda at: math.exp(at),
        1: lambda at: (at - 1) * math.exp(at),
        2: lambda at: (at * at - 2 * at + 2) * math.exp(at),
    }
    for power, integral in integrals.items():
        found = sum(weight.item() * LAMBDA[place] ** power for place, weight in step.weights.items())
        assert found == pytest.approx((integral(LAMBDA[2]) - integral(LAMBDA[1])) / 5)


def test_third_order_looks_two_points_back() -> None:
    step = step_from(PATH, 1, 2)
    assert sorted(step.weights) == [0, 1]
    spread = torch.tensor([[1 / 2], [1 / 3], [1 / 5], [1 / 9]], dtype=torch.float64)
    assert sorted(step_from(Path(1 - spread, spread), 2, 3).weights) == [0, 1, 2]


def test_samples_are_solved_each_by_its_own_levels() -> None:
    """A row's weights do not depend on the other rows."""
    spread = torch.tensor([[0.9, 0.5], [0.7, 0.4], [0.6, 0.1]], dtype=torch.float64)
    both = Path(1 - spread, spread)
    for corrects in (False, True):
        together = step_from(both, 1, 2, corrects)
        for row in range(2):
            alone = step_from(both.of([row]), 1, 2, corrects)
            for place, weight in together.weights.items():
                torch.testing.assert_close(weight[row : row + 1], alone.weights[place])
