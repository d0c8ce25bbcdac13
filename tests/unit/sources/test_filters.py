"""``filter_func`` by name: folders, tables and captions beside them."""

import logging
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kubetuner.config.sections.sources import DatasetSource, DownloadSection, PathFilter
from kubetuner.errors import ConfigError, DatasetError
from kubetuner.sources.base import Filtered
from kubetuner.sources.filters import NameTest, Tally, describe
from kubetuner.sources.switch import open_source
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan

CONFIG = {"model_type": "full", "model_family": "pixart_sigma", "train_batch_size": 2, "max_train_steps": 10}
NAMES = ("a_1.png", "a_2.png", "drafts/a_3.png", "drafts/old/b_4.png", "final/b_5.png", "final/B_6.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(NAMES):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 128), (40 * index, 0, 0)).save(path)
    return tmp_path


def entry(**more: Any) -> dict[str, Any]:
    return {"id": "set", "instance_data_dir": "pictures", "resolution": 128, **more}


@pytest.mark.parametrize(
    ("paths", "kept"),
    [
        ({"include": ("b_",), "match": "contains"}, "45"),
        ({"include": ("a_*",), "match": "glob"}, "123"),  # the bare name is a name too
        ({"include": ("drafts/*",), "match": "glob"}, "34"),
        ({"include": ("[ab]_[1-4].png",), "match": "glob"}, "1234"),
        ({"include": ("draft*",)}, "34"),
        ({"include": ("a_1", "b_5")}, "15"),
        ({"exclude": ("drafts/",)}, "1256"),
        ({"include": ("a_",), "exclude": ("drafts",)}, "12"),
        ({"include": (r"^(?i:b)_\d",), "match": "regex"}, "456"),
        ({"include": (r"re:^final/b",)}, "5"),
        ({"include": ("re:^final/b",), "match": "contains"}, ""),
        ({"include": ("a_1.png", "final/b_5.png", "final"), "match": "exact"}, "15"),
        ({"include": ("b_*",), "match": "contains"}, ""),
    ],
)
def test_which_names_pass(paths: dict[str, Any], kept: str) -> None:
    test = NameTest(PathFilter(**paths))
    assert "".join(name[-5] for name in NAMES if not test.refusal([name])) == kept


def test_a_picture_of_several_names_is_left_out_by_any_of_them() -> None:
    test = NameTest(PathFilter(include=("ring",), exclude=("draft",)))
    assert test.refusal(["ring/1.png", "x.png"]) == ""
    assert test.refusal(["ring/1.png", "draft.png"]) == "path_exclude"
    assert test.refusal([]) == "path_include"


def test_the_plan_counts_and_names_what_is_left_out(folder: Path) -> None:
    given = {"path_include": ["a_", "b_"], "path_exclude": "drafts/"}
    plan = make_plan(CONFIG, [entry(filter_func=given)], cwd=folder)
    assert plan.summary["samples"] == {"set": 3}
    assert plan.summary["filtered"] == {"set": 3}
    remark = (
        "- `set`: filter_func leaves out 3 pictures: 2 by path_exclude (drafts/a_3.png, drafts/old/b_4.png), "
        "1 by path_include (final/B_6.png)"
    )
    assert remark in plan.markdown.splitlines()
    artifact = download_dataset(plan.sections.download, folder / "out")
    assert (artifact.num_samples, artifact.skipped) == (3, ())


def test_left_out_pictures_may_change_after_the_plan(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = make_plan(CONFIG, [entry(filter_func={"path_exclude": "drafts/"})], cwd=folder)
    (settings,) = plan.sections.download.datasets
    Image.new("RGB", (64, 64)).save(folder / "pictures/drafts/a_3.png")
    Image.new("RGB", (64, 64)).save(folder / "pictures/drafts/new.png")
    with closing(open_source(settings)) as source:
        assert source.listing().revision == settings.revision
    Image.new("RGB", (64, 64)).save(folder / "pictures/late.png")
    caplog.set_level(logging.INFO)
    assert download_dataset(plan.sections.download, folder / "out").num_samples == 4
    assert "1 file(s) came after the run was planned and are left out: late.png" in caplog.text
    assert "set: filter_func leaves out 3 by path_exclude (drafts/a_3.png, " in caplog.text
    os.remove(folder / "pictures/a_1.png")
    with pytest.raises(DatasetError, match="has changed after the run was planned"):
        download_dataset(plan.sections.download, folder / "out")


def test_a_filter_that_leaves_nothing_stops_the_plan_and_the_download(folder: Path) -> None:
    given = {"path_include": "*.jpg"}
    with pytest.raises(ConfigError) as caught:
        make_plan(CONFIG, [entry(filter_func=given)], cwd=folder)
    (problem,) = caught.value.problems
    assert problem.where == "multidatabackend.json[0].filter_func"
    assert problem.message == (
        f"leaves out all 6 pictures of {folder}/pictures: 6 by path_include (a_1.png, a_2.png, drafts/a_3.png, …); "
        "loosen or correct it."
    )
    settings = DatasetSource(id="set", instance_data_dir=str(folder / "pictures"), paths=PathFilter(include=("*.jpg",)))
    with pytest.raises(DatasetError, match=r"dataset 'set': filter_func leaves out all 6 pictures of .*; loosen"):
        download_dataset(DownloadSection(datasets=(settings,)), folder / "out")


def test_an_empty_folder_is_not_the_filters_fault(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ConfigError) as caught:
        make_plan(CONFIG, [entry(filter_func={"path_include": "a"})], cwd=tmp_path)
    assert [problem.where for problem in caught.value.problems] == ["multidatabackend.json[0].instance_data_dir"]


def test_a_table_and_captions_in_a_table(folder: Path) -> None:
    rows = [{"url": name, "text": f"picture {index}"} for index, name in enumerate(NAMES)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pictures/rings.parquet")
    table = {
        "id": "set", "type": "csv", "csv_file": "pictures/rings.parquet", "csv_caption_column": "text",
        "resolution": 128,
    }  # fmt: skip
    beside = entry(
        caption_strategy="parquet",
        parquet={
            "path": "pictures/rings.parquet",
            "filename_column": "url",
            "caption_column": "text",
            "identifier_includes_extension": True,
        },
    )
    artifacts = []
    for number, one in enumerate((table, beside)):
        plan = make_plan(CONFIG, [one | {"filter_func": {"path_include": "final/*"}}], cwd=folder)
        artifacts.append(download_dataset(plan.sections.download, folder / f"out-{number}"))
    assert [artifact.num_samples for artifact in artifacts] == [2, 2]
    assert artifacts[0].fingerprint == artifacts[1].fingerprint


def test_masks_are_filtered_too(folder: Path) -> None:
    for name in NAMES:
        stem = folder / "pictures" / name.removesuffix(".png")
        Image.new("L", (128, 128), 255).save(f"{stem}.webp")
    pictures = entry(filter_func={"path_include": "*.png"}, conditioning_data="m", max_num_samples=4)
    masks = {
        "id": "m", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "pictures",
        "filter_func": {"path_exclude": "*.png"},
    }  # fmt: skip
    plan = make_plan(CONFIG, [pictures, masks], cwd=folder)
    assert "`m` (mask): masks for all 4 pictures of `set`; filter_func leaves out 6 by path_exclude" in plan.markdown
    artifact = download_dataset(plan.sections.download, folder / "out")
    assert (artifact.num_samples, artifact.skipped) == (4, ())
    nothing = masks | {"filter_func": {"path_include": "none"}}
    with pytest.raises(ConfigError) as caught:
        make_plan(CONFIG, [pictures, nothing], cwd=folder)
    assert [problem.where for problem in caught.value.problems] == ["multidatabackend.json[1].filter_func"]


def test_a_tally_is_short() -> None:
    tally = Tally()
    for index in range(20):
        tally.add(f"collection {index % 7}", f"line\n{index}")
    tally.add("min_width", "")
    found = tally.result()
    assert found[0] == Filtered("collection 0", 3, ("line\n0", "line\n7", "line\n14"))
    told = describe(found)
    assert told.startswith("3 by collection 0 (line\\n0, line\\n7, line\\n14), 3 by collection 1 (")
    assert told.endswith("), 6 for 3 other reasons")
