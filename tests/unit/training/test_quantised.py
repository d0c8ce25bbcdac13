"""A base of fewer bits under an adapter."""

from pathlib import Path

import pytest
import torch

from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.errors import InputError, TrainingError
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.loop import train_denoiser
from kubetuner.training.saving import save_adapter
from tests.unit.rounding import hide_libraries, quantised, quiet
from tests.unit.training.conftest import RandomBatches, Setup

FAMILIES = ("pixart_sigma", "sdxl", "sana")
PRECISIONS = {"int8-torchao": 0.03, "int8-quanto": 0.03, "nf4-bnb": 0.2}
"""With the largest relative error of a prediction."""
LORA = LoraSettings(rank=2, alpha=4.0, dropout=0.0)
LOKR = LoraSettings(algorithm="lokr", rank=2, alpha=2.0, dropout=0.0, target_classes=("Attention",))
pytestmark = [quantised, quiet, pytest.mark.parametrize("precision", PRECISIONS)]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_learns_on_rounded_weights(
    setup: Setup, tmp_path: Path, family: str, precision: str, mixed_precision: str
) -> None:
    shared = {"max_train_steps": 4, "mixed_precision": mixed_precision, "lora": LORA}
    whole = setup.job(family, RandomBatches(family), **shared)
    job = setup.job(family, RandomBatches(family), base_model_precision=precision, **shared)
    plain, rounded = (one.objective.answer(one.denoiser.eval(), one.question(0, 0)).detach() for one in (whole, job))
    error = (plain - rounded).norm() / plain.norm()
    assert 0 < error < PRECISIONS[precision]
    before = {name: value.detach().clone() for name, value in job.trained().items()}
    assert {value.dtype for value in before.values()} == {torch.float32}

    train_denoiser(job, Checkpoints(tmp_path / "checkpoints", "key", 1), lambda _values, _step: None)
    save_adapter(job, tmp_path / "adapter")

    assert all(not torch.equal(before[name], value) for name, value in job.trained().items())


def test_other_adapters_on_rounded_weights(setup: Setup, tmp_path: Path, precision: str) -> None:
    if precision == "nf4-bnb":
        pytest.skip("refused by the configuration: PEFT's LoKr does not see the shape of packed weights")
    job = setup.job("sana", RandomBatches("sana"), base_model_precision=precision, max_train_steps=1, lora=LOKR)
    train_denoiser(job, Checkpoints(tmp_path / "checkpoints", "key", 1), lambda _values, _step: None)
    save_adapter(job, tmp_path / "adapter")


def test_the_saved_adapter_is_compared_on_equal_weights(setup: Setup, tmp_path: Path, precision: str) -> None:
    """It is an adapter of the rounded base that is checked: on another base it would predict something else."""
    job = setup.job("sana", RandomBatches("sana"), base_model_precision=precision, max_train_steps=1, lora=LORA)
    with torch.no_grad():
        next(value for name, value in job.denoiser.named_parameters() if name.endswith("scale_shift_table")).add_(1.0)
    with pytest.raises(TrainingError, match="does not load as it was trained"):
        save_adapter(job, tmp_path / "adapter")


def test_a_missing_library_is_named(setup: Setup, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_libraries(monkeypatch)
    with pytest.raises(InputError, match=rf"{precision} needs the Python package .* install kubetuner\[quantised\]"):
        setup.job("sana", RandomBatches("sana"), base_model_precision=precision)
