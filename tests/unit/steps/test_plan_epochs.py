"""``start_epoch`` and ``end_epoch`` become the steps that those epochs last."""

from pathlib import Path
from typing import Any

import pytest

from kubetuner.config.load import load
from kubetuner.errors import ConfigError
from kubetuner.steps.plan import Plan, make_plan
from tests.unit.steps.test_plan_sampling import SQUARE, entry, message, pictures

CONFIG: dict[str, Any] = {
    "model_type": "full", "model_family": "pixart_sigma", "train_batch_size": 2, "num_train_epochs": 5,
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """8 pictures in ``a`` and 6 in ``b``: 4 and 3 batches of 2."""
    pictures(tmp_path / "a", *[SQUARE] * 8)
    pictures(tmp_path / "b", *[SQUARE] * 6)
    return tmp_path


def steps(plan: Plan) -> dict[str, tuple[int, int | None]]:
    return {one.id: (one.start_step, one.end_step) for one in plan.sections.train.datasets}


def test_an_epoch_lasts_as_long_as_its_datasets(folders: Path) -> None:
    """Epochs 1 and 2 have a (4 steps each), epoch 3 both (7), 4 and 5 b alone (3 each): 8 + 7 + 6 = 21."""
    plan = make_plan(CONFIG, [entry(end_epoch=3), entry("b", start_epoch=3)], cwd=folders)
    assert steps(plan) == {"a": (1, 15), "b": (9, None)}
    assert (plan.sections.train.max_train_steps, plan.sections.train.num_train_epochs) == (21, 0)
    assert plan.summary["max_train_steps"] == 21
    assert "- `a`: epochs 1 to 3 are steps 1 to 15" in plan.markdown
    assert "- `b`: from epoch 3 on, which is from step 9 on" in plan.markdown
    assert "- steps 9 to 15: `a` 57.1 %, `b` 42.9 %" in plan.markdown


def test_accumulation_repeats_and_a_given_number_of_steps(folders: Path) -> None:
    """a twice: 8 batches, 4 steps; both: 11 batches, 6 steps."""
    config = CONFIG | {"num_train_epochs": 0, "max_train_steps": 50, "gradient_accumulation_steps": 2}
    plan = make_plan(config, [entry(repeats=1), entry("b", start_epoch=2, end_epoch=3)], cwd=folders)
    assert steps(plan) == {"a": (0, None), "b": (5, 16)}
    assert plan.sections.train.max_train_steps == 50


def test_nothing_changes_without_a_schedule(folders: Path) -> None:
    for asks_nothing in ({}, {"start_epoch": 0}, {"start_epoch": 1}):
        plan = make_plan(CONFIG, [entry(**asks_nothing)], cwd=folders)
        assert (plan.sections.train.max_train_steps, plan.sections.train.num_train_epochs) == (0, 5)


def test_epochs_without_a_dataset(folders: Path) -> None:
    data = [entry(end_epoch=2), entry("b", start_epoch=4)]
    assert "[0].end_epoch: leaves the epochs from 3 on without any dataset" in message(CONFIG, data, folders)
    # A run that ends before does not care: epoch 3 would begin with step 9.
    short = CONFIG | {"num_train_epochs": 2}
    assert make_plan(short, data, cwd=folders).sections.train.max_train_steps == 8
    steps_alone = CONFIG | {"num_train_epochs": 0, "max_train_steps": 8}
    assert steps(make_plan(steps_alone, data, cwd=folders))["a"] == (1, 8)
    assert "from 3 on" in message(steps_alone | {"max_train_steps": 9}, data, folders)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([entry(start_epoch=3, end_epoch=2), entry("b")], "end_epoch: is 2, before start_epoch 3"),
        (
            [entry(), entry("b", start_epoch=2, dataset_type="eval")],
            "start_epoch: has no meaning with dataset_type eval",
        ),
        ([entry(start_step=4), entry("b", start_epoch=2)], "write all of them in one unit"),
    ],
)
def test_mistakes_are_named(data: list[dict[str, Any]], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(CONFIG | {"num_train_epochs": 0, "max_train_steps": 9}, data)
    assert expected in str(caught.value)
