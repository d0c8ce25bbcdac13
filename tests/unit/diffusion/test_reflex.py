from dataclasses import replace

import pytest
import torch

from kubetuner.diffusion.flow import FlowProcess
from kubetuner.diffusion.reflex import emphasis, turning


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


def test_emphasis_by_hand() -> None:
    """Changes 1, 3, 0, 0 have mean 1: factors 1 + 0.5 * (1, 3, 0, 0)."""
    found = emphasis(0.5, row(1, -1, 2, 5), row(2, 2, 2, 5))
    torch.testing.assert_close(found, row(1.5, 2.5, 1, 1))


def test_nothing_is_emphasised_where_nothing_changed() -> None:
    assert torch.equal(emphasis(3.0, row(1, 2), row(1, 2)), row(1, 1))


def test_turning_by_hand() -> None:
    """From (1, 1) to (4, 5) is the direction (0.6, 0.8); (5, 12) has (5, 12) / 13."""
    found = turning(row(5, 12), row(4, 5), row(1, 1))
    assert found.tolist() == pytest.approx([(5 / 13 - 0.6) ** 2 + (12 / 13 - 0.8) ** 2])
    assert turning(row(0.3, 0.4), row(4, 5), row(1, 1)).item() == pytest.approx(0, abs=1e-12)
    assert turning(row(-3, -4), row(4, 5), row(1, 1)).item() == pytest.approx(4)


def test_emphasis_is_a_factor_of_each_elements_loss() -> None:
    process = FlowProcess()
    sample = process.add_noise(row(0, 0), row(1, 2), torch.tensor([0.5]))
    emphasised = replace(sample, emphasis=row(3, 0.5))
    # Squared errors of a zero prediction are 1 and 4.
    assert process.loss(row(0, 0), sample).item() == pytest.approx(2.5)
    assert process.loss(row(0, 0), emphasised).item() == pytest.approx((3 * 1 + 0.5 * 4) / 2)
