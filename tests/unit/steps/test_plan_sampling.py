"""What the plan says about how often pictures are seen, and how it finds datasets that are too small."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kubetuner.artifacts import Sample, read_rows
from kubetuner.errors import ConfigError
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import Plan, make_plan

CONFIG: dict[str, Any] = {
    "model_type": "full", "model_family": "pixart_sigma", "train_batch_size": 2, "max_train_steps": 10,
}  # fmt: skip
SQUARE, WIDE = (128, 128), (192, 64)  # their own buckets: 1.0 and 3.0


def pictures(folder: Path, *sizes: tuple[int, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, size in enumerate(sizes):
        Image.new("RGB", size, (index, 0, 0)).save(folder / f"{index}.png")


def entry(name: str = "a", **more: Any) -> dict[str, Any]:
    return {"id": name, "instance_data_dir": name, "resolution": 128, **more}


def message(config: dict[str, Any], data: list[dict[str, Any]], cwd: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(config, data, cwd=cwd)
    return str(caught.value)


def repeats(plan: Plan) -> dict[str, int]:
    return {one.id: one.repeats for one in plan.sections.train.datasets}


def test_samples_per_epoch_are_printed(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 5)
    pictures(tmp_path / "b", *[SQUARE] * 3, WIDE)
    data = [entry(repeats=2), entry("b", repeats=1, probability=0.5)]
    plan = make_plan({**CONFIG, "train_batch_size": 4}, data, cwd=tmp_path)
    assert plan.summary["samples_per_epoch"] == {"a": 12, "b": 4}  # 15 and 6 + 2, in batches of 4
    assert plan.summary["steps_per_epoch"] == 4
    assert "| a | trained on | 5 | 0 | 1 | 2 | 12 |" in plan.markdown
    assert "Samples per epoch: 16; pictures x (repeats + 1)" in plan.markdown
    assert "- steps from 1 on: `a` 85.7 %, `b` 14.3 %" in plan.markdown  # 12 : 4 * 0.5
    uniform = {**CONFIG, "train_batch_size": 4, "data_backend_sampling": "uniform"}
    assert "- steps from 1 on: `a` 66.7 %, `b` 33.3 %" in make_plan(uniform, data, cwd=tmp_path).markdown


def test_the_page_shows_the_schedule(tmp_path: Path) -> None:
    for name in "ab":
        pictures(tmp_path / name, *[SQUARE] * 4)
    data = [entry(end_step=4), entry("b", start_step=4, end_step=8), entry("c", instance_data_dir="a", start_step=5)]
    page = make_plan(CONFIG, data, cwd=tmp_path).markdown
    shares = [line for line in page.splitlines() if line.startswith("- steps")]
    assert shares == [
        "- steps 1 to 3: `a` 100.0 %",
        "- steps 4 to 4: `a` 50.0 %, `b` 50.0 %",
        "- steps 5 to 8: `b` 50.0 %, `c` 50.0 %",
        "- steps from 9 on: `c` 100.0 %",
    ]


def test_oversubscription_raises_repeats_that_are_not_set(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 3, WIDE)
    pictures(tmp_path / "b", *[SQUARE] * 25)
    pictures(tmp_path / "c", *[SQUARE] * 8)
    config = {**CONFIG, "train_batch_size": 4, "gradient_accumulation_steps": 8}
    data = [entry(), entry("b"), entry("c", repeats=3)]
    refused = message(config, data, tmp_path)
    assert "multidatabackend.json[0].repeats" in refused
    assert "multidatabackend.json[1].repeats" in refused
    assert "set repeats to 1, or train_batch_size to 3, or allow_dataset_oversubscription to true" in refused

    plan = make_plan({**config, "allow_dataset_oversubscription": True}, data, cwd=tmp_path)
    assert repeats(plan) == {"a": 7, "b": 1, "c": 3}  # 4 pictures x 8 = 32, 25 x 2 = 50
    assert plan.summary["repeats"] == {"a": 7, "b": 1, "c": 3}
    assert "- `b`: repeats was not set and is raised to 1 (allow_dataset_oversubscription)" in plan.markdown
    assert "| b | trained on | 25 | 0 | 1 | 1 | 48 |" in plan.markdown
    assert '"repeats":7' in plan.sections.push.training
    assert "`c`: repeats" not in plan.markdown


def test_oversubscription_leaves_no_bucket_out_and_set_repeats_alone(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 6, WIDE)
    allowing = {**CONFIG, "train_batch_size": 4, "allow_dataset_oversubscription": True}
    assert "left out: fills no batch" in make_plan({**CONFIG, "train_batch_size": 4}, [entry()], cwd=tmp_path).markdown
    plan = make_plan(allowing, [entry()], cwd=tmp_path)
    assert repeats(plan) == {"a": 3}
    assert "left out" not in plan.markdown
    assert repeats(make_plan(allowing, [entry(repeats=0)], cwd=tmp_path)) == {"a": 0}
    too_few = {**allowing, "train_batch_size": 16}
    assert "allow_dataset_oversubscription" not in message(too_few, [entry(repeats=0)], tmp_path)


def few_pictures(root: Path) -> Path:
    """Folders ``<squares>_<wide>`` of 1 to 3 squares and 0 to 2 wide pictures."""
    for squares in range(1, 4):
        for wide in range(3):
            pictures(root / f"{squares}_{wide}", *[SQUARE] * squares, *[WIDE] * wide)
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_pictures(tmp_path_factory.mktemp("folders"))


@given(
    squares=st.integers(1, 3), wide=st.integers(0, 2), batch=st.integers(1, 9), accumulation=st.integers(1, 5),
    passes=st.one_of(st.none(), st.integers(0, 3)),
)  # fmt: skip
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_every_setting_that_is_advised_is_the_least_that_makes_the_plan_pass(
    folders: Path, squares: int, wide: int, batch: int, accumulation: int, passes: int | None
) -> None:
    config = {**CONFIG, "train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    given_repeats = {} if passes is None else {"repeats": passes}
    data = [entry(instance_data_dir=f"{squares}_{wide}", **given_repeats)]
    try:
        plan = make_plan(config, data, cwd=folders)
    except ConfigError as error:
        advice = str(error).partition("To fix it, ")[2]
    else:
        assert sum(plan.summary["samples_per_epoch"].values()) >= batch * accumulation  # type: ignore[attr-defined]
        return
    alternatives = [
        {name: int(value) for name, value in re.findall(r"(\w+) to (\d+)", part)} for part in advice.split(", or ")
    ]
    assert "repeats" in alternatives[0]
    for settings_ in alternatives:
        ours = {name: value for name, value in settings_.items() if name == "repeats"}
        others = {name: value for name, value in settings_.items() if name != "repeats"}
        make_plan({**config, **others, **_allowed(settings_)}, [{**data[0], **ours}], cwd=folders)
        if nearer := {name: value + 1 for name, value in list(others.items())[-1:]}:
            message({**config, **others, **nearer}, data, folders)  # and nothing nearer to what was asked for does
        elif ours.get("repeats"):
            message(config, [{**data[0], "repeats": ours["repeats"] - 1}], folders)
    assert ("allow_dataset_oversubscription to true" in advice) is (passes is None)


def _allowed(advised: dict[str, int]) -> dict[str, bool]:
    """The one alternative that is no number."""
    return {} if advised else {"allow_dataset_oversubscription": True}


def test_a_part_of_a_dataset_is_the_same_part_everywhere(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 30)
    plan = make_plan(CONFIG, [entry(max_num_samples=7), entry("b", instance_data_dir="a")], cwd=tmp_path)
    assert plan.summary["samples"] == {"a": 7, "b": 30}
    names = []
    for run in ("1", "2"):
        artifact = download_dataset(plan.sections.download, tmp_path / run)
        assert artifact.num_samples == 37
        found = (row.id for row in read_rows(tmp_path / run, "samples.jsonl", Sample) if row.dataset == "a")
        names.append(list(found))
    # random.Random("a") shuffles 0..29 to 1, 29, 23, 24, 27, 10, 7, ...: places in the sorted list of names.
    assert names[0] == names[1] == [f"a/{number}.png" for number in (1, 15, 18, 3, 4, 7, 9)]
    other = make_plan(CONFIG, [entry("z", instance_data_dir="a", max_num_samples=7)], cwd=tmp_path)
    download_dataset(other.sections.download, tmp_path / "3")
    assert {row.id.partition("/")[2] for row in read_rows(tmp_path / "3", "samples.jsonl", Sample)} != {
        name.partition("/")[2] for name in names[0]
    }


def test_pictures_that_fill_no_whole_batch_do_not_count(tmp_path: Path) -> None:
    """8 and 8 are 16 pictures, but only 2 batches of 5."""
    pictures(tmp_path / "a", *[SQUARE] * 2, *[WIDE] * 2)
    config = {**CONFIG, "train_batch_size": 5, "gradient_accumulation_steps": 3}
    assert "x gradient_accumulation_steps 3 = 15" in message(config, [entry(repeats=3)], tmp_path)
    allowing = {**config, "allow_dataset_oversubscription": True}
    assert repeats(make_plan(allowing, [entry()], cwd=tmp_path)) == {"a": 4}  # 10 and 10: 4 batches


def test_regularisation_data_is_shown_as_such(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 2)
    lora = {**CONFIG, "model_type": "lora"}
    plan = make_plan(lora, [entry(is_regularisation_data=True), entry("b", instance_data_dir="a")], cwd=tmp_path)
    assert "| a | keeps the base's answers | 2 |" in plan.markdown
    assert "| b | trained on | 2 |" in plan.markdown


def test_more_than_there_is_is_everything(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 3)
    assert make_plan(CONFIG, [entry(max_num_samples=9)], cwd=tmp_path).summary["samples"] == {"a": 3}


def test_limits_and_lists_of_aspect_ratios_decide_the_buckets(tmp_path: Path) -> None:
    pictures(tmp_path / "a", *[SQUARE] * 4, *[(256, 64)] * 3, *[(64, 256)] * 3)
    limited = entry(minimum_aspect_ratio=0.5, maximum_aspect_ratio=2)
    plan = make_plan(CONFIG, [limited], cwd=tmp_path)
    assert plan.summary["buckets"] == {"a": {"1.0": 4}}
    assert plan.summary["skipped"] == {"a": 6}
    assert "256x64 pixels: aspect ratio 2 is" not in plan.markdown
    assert re.search(r"a/4\.png`: 256x64 pixels: aspect ratio [\d.]+ is above maximum_aspect_ratio 2", plan.markdown)
    closest = entry(resolution=256, crop=True, crop_aspect="closest", crop_aspect_buckets=[0.5, 1, 1.5])
    buckets = make_plan(CONFIG, [closest], cwd=tmp_path).summary["buckets"]
    # E = 256: 1.5 gives 320x192 and 0.5 gives 192x384 (313.5 and 209; 181 and 362).
    assert buckets == {"a": {"1.0": 4, "1.67": 3, "0.5": 3}}
