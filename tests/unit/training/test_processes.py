"""Two processes train what one trains with twice the accumulation steps."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kubetuner.training.distributed.launch import launch
from tests.unit.training.conftest import Setup
from tests.unit.training.together import CASES, train_case


@pytest.fixture(scope="module")
def two(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as two processes trained it; some go on from what one process did."""
    out = tmp_path_factory.mktemp("two")
    for name, case in CASES.items():
        if case.interrupted < 3:
            train_case(name, setup, out, steps=case.interrupted)
    launch("tests.unit.training.together", f"{setup.bases}\n{out}", 2)
    return out


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_are_those_of_one_process(
    setup: Setup, two: Path, tmp_path: Path, name: str
) -> None:
    for unforeseen in (two / name).glob("unforeseen-*"):
        pytest.fail(unforeseen.read_text())
    train_case(name, setup, tmp_path)
    one, other = (load_file(folder / name / "result.safetensors") for folder in (tmp_path, two))
    seen = other["logged"]
    expected = one["logged"][-len(seen) :]
    assert seen.shape == expected.shape
    torch.testing.assert_close(seen, expected, rtol=CASES[name].rounding, atol=1e-6)
    assert one.keys() == other.keys()
    for key in one.keys() - {"logged"}:
        torch.testing.assert_close(
            other[key],
            one[key],
            rtol=1e-3,
            atol=CASES[name].rounding / 5,
            equal_nan=True,
            msg=lambda text, key=key: f"{key}: {text}",
        )
    errors = [
        {file.read_text().replace(str(folder), "") for file in (folder / name).glob("error-*")}
        for folder in (tmp_path, two)
    ]
    assert errors[0] == errors[1]
