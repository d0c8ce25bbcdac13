"""The plan's arithmetic and advice where datasets have batches of their own sizes."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kubetuner.config.sections.steps import ModelRef
from kubetuner.errors import ConfigError
from kubetuner.steps.plan import make_plan
from kubetuner.steps.planning.memory import CARD
from tests.unit.steps.test_plan_sampling import CONFIG, SQUARE, WIDE, entry, few_pictures, message, pictures, repeats


def test_batches_steps_and_shares_are_counted_by_each_datasets_size(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 9, *[WIDE] * 5)
    pictures(tmp_path / "b", *[SQUARE] * 6)
    config = {**CONFIG, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    plan = make_plan(config, [entry(train_batch_size=4), entry("b")], cwd=tmp_path)

    # 9 // 4 + 5 // 4 batches of a, 6 // 2 of b.
    assert plan.summary["samples_per_epoch"] == {"a": 12, "b": 6}
    assert plan.summary["steps_per_epoch"] == 3
    assert "| a | trained on | 14 | 0 | 2 | 0 | 12 | 4 |" in plan.markdown
    assert "| b | trained on | 6 | 0 | 1 | 0 | 6 | 2 |" in plan.markdown
    assert "| steps | 10 of 4 to 8 pictures; 3 per epoch, 3.3 epochs |" in plan.markdown
    assert "- steps from 1 on: `a` 50.0 %, `b` 50.0 %" in plan.markdown  # 3 batches each.
    assert '"train_batch_size":4' in plan.sections.push.training


def test_the_page_says_where_noise_levels_are_drawn_otherwise(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 2)
    config = {**CONFIG, "model_family": "sana", "flow_sigmoid_scale": 0.5}
    data = [entry(timestep_sampling_offset=2), entry("b", instance_data_dir="a")]
    page = make_plan(config, data, cwd=tmp_path).markdown
    assert "- `a`: half of its noise levels are above sigma 0.73 before the shift" in page
    assert "- `b`" not in page
    refused = message({**CONFIG, "model_family": "sdxl"}, data, tmp_path)
    assert "multidatabackend.json[0].timestep_sampling_offset: has no effect with model_family sdxl" in refused


def test_a_bucket_is_left_out_by_its_own_datasets_size(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 4, *[WIDE] * 3)
    data = [entry(train_batch_size=4), entry("b", instance_data_dir="a")]
    page = make_plan(CONFIG, data, cwd=tmp_path).markdown
    assert "| a | 3.0 | 192x64 | 3 | left out: fills no batch |" in page
    assert "| b | 3.0 | 192x64 | 3 |  |" in page


def test_a_schedule_in_epochs_lasts_as_long_as_its_batches(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 8)
    pictures(tmp_path / "b", *[SQUARE] * 6)
    config = {**CONFIG, "max_train_steps": 0, "num_train_epochs": 3}
    data = [entry(train_batch_size=4, end_epoch=2), entry("b", start_epoch=2)]
    plan = make_plan(config, data, cwd=tmp_path)
    # Epoch 1: 2 batches of a. Epoch 2: those and 3 of b. Epoch 3: 3 of b.
    assert plan.sections.train.max_train_steps == 2 + 5 + 3
    assert [(one.start_step, one.end_step) for one in plan.sections.train.datasets] == [(1, 7), (3, None)]


def test_oversubscription_fills_the_datasets_own_batch(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 3)
    allowing = {**CONFIG, "allow_dataset_oversubscription": True}
    data = [entry(train_batch_size=8), entry("b", instance_data_dir="a")]
    assert repeats(make_plan(allowing, data, cwd=tmp_path)) == {"a": 2, "b": 0}


def test_a_dataset_too_small_for_its_own_batch_is_refused_with_its_size(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 3)
    refused = message(CONFIG, [entry(train_batch_size=8), entry("b", instance_data_dir="a")], tmp_path)
    assert "multidatabackend.json[0].repeats: one optimizer step needs train_batch_size 8 x" in refused
    assert "To fix it, set repeats to 2, or its train_batch_size to 3, or allow_dataset_oversubscription" in refused
    assert "[1]" not in refused


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_pictures(tmp_path_factory.mktemp("folders"))


@given(
    squares=st.integers(1, 3), wide=st.integers(0, 2), own=st.integers(1, 9), accumulation=st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_every_setting_that_is_advised_makes_the_plan_pass(
    folders: Path, squares: int, wide: int, own: int, accumulation: int
) -> None:
    config = {**CONFIG, "train_batch_size": 1, "gradient_accumulation_steps": accumulation}
    one = entry(instance_data_dir=f"{squares}_{wide}", train_batch_size=own)
    try:
        plan = make_plan(config, [one], cwd=folders)
    except ConfigError as error:
        advice = str(error).partition("To fix it, ")[2]
    else:
        assert sum(plan.summary["samples_per_epoch"].values()) >= own * accumulation  # type: ignore[attr-defined]
        return
    for part in advice.split(", or "):
        changes: dict[str, Any] = {name: int(value) for name, value in re.findall(r"(\w+) to (\d+)", part)}
        ours = {name: changes.pop(name) for name in ("repeats", "train_batch_size") if name in changes}
        assert ("its " in part) is ("train_batch_size" in ours)
        if not ours:
            changes = {"allow_dataset_oversubscription": True}
        make_plan({**config, **changes}, [{**one, **ours}], cwd=folders)


def test_the_batch_that_takes_most_memory_is_predicted(bases: dict[str, ModelRef], tmp_path: Path, monkeypatch) -> None:
    """Many small pictures or few large ones, whichever take more."""
    pictures(tmp_path / "small", *[(128, 128)] * 16)
    pictures(tmp_path / "large", *[(256, 256)] * 16)
    base = {"model_family": "sana", "pretrained_model_name_or_path": bases["sana"].path, "train_batch_size": 2}

    def page(small: int | None, large: int | None, **more: object) -> tuple[str, int]:
        data = [entry("small", train_batch_size=small), entry("large", train_batch_size=large, resolution=256)]
        plan = make_plan({**CONFIG, **base, **more}, data, cwd=tmp_path, predict_memory=True)
        peak = plan.summary["peak_memory_bytes"]
        assert isinstance(peak, int)
        return plan.markdown, peak

    found = {sizes: page(*sizes) for sizes in ((None, None), (16, None), (None, 1), (16, 1), (1, 8))}
    batch = {sizes: re.search(r"for a batch of (\d+ of \d+x\d+)", text)[1] for sizes, (text, _) in found.items()}  # type: ignore[index]
    assert batch == {
        (None, None): "2 of 256x256", (16, None): "16 of 128x128", (None, 1): "1 of 256x256",
        (16, 1): "16 of 128x128", (1, 8): "8 of 256x256",
    }  # fmt: skip
    assert found[16, 1][1] == found[16, None][1] > found[None, None][1] > found[None, 1][1]

    monkeypatch.setenv(CARD, "0.001")
    text, _ = page(16, None, gradient_checkpointing=False)
    assert '"gradient_checkpointing": true' in text
    assert '"train_batch_size"' not in text
    assert "Smaller batches take less; those of small are set in the data file." in text
    plain, _ = page(None, None)
    assert '"train_batch_size": 1, "gradient_accumulation_steps": 2' in plain
    assert "Smaller batches take less" not in plain
