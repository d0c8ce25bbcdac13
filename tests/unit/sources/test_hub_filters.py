"""``filter_func`` over a real hub: rows of parquet files, and of the metadata files of folders."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kubetuner.artifacts import SAMPLES_FILE, Sample, read_rows
from kubetuner.config.sections.sources import DatasetSource, DownloadSection
from kubetuner.errors import ConfigError, DatasetError
from kubetuner.sources.hub import HubSource
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import Plan, make_plan
from tests.servers.dataset_hub import DatasetHub
from tests.servers.faults import FaultyProxy
from tests.unit.sources.test_hub import CONFIG, NAME, png, table

ROWS: list[dict[str, Any]] = [
    {"collection": "photo", "width": 400, "height": 320, "quality": {"aesthetic": 6.0, "sharp": 1}},
    {"collection": "photo", "width": 300, "height": 320, "quality": {"aesthetic": 4.0, "sharp": 3}},
    {"collection": "scan", "width": 400, "height": 320, "quality": {"aesthetic": 7.0, "sharp": 1}},
    {"collection": None, "width": 400, "height": 200, "quality": None},
    {"collection": "scan", "width": 401, "height": 321, "quality": {"aesthetic": None, "sharp": 5}},
    {"collection": "photo", "width": None, "height": 320, "quality": {"aesthetic": 9.5, "sharp": 2}},
]


def rows() -> list[dict[str, Any]]:
    """Pictures ``0.png`` to ``5.png`` of the sizes that their rows say."""
    sizes = [(row["width"] or 400, row["height"]) for row in ROWS]
    images = [{"bytes": png(index, size), "path": f"{index}.png"} for index, size in enumerate(sizes)]
    return [{"image": image, "text": f"picture {index}", **ROWS[index]} for index, image in enumerate(images)]


def entry(given: object, **more: Any) -> dict[str, Any]:
    return {
        "id": "set", "type": "huggingface", "dataset_name": NAME, "caption_column": "text", "resolution": 128,
        "filter_func": given, **more,
    }  # fmt: skip


def names_in(plan: Plan, out: Path) -> str:
    download_dataset(plan.sections.download, out)
    return "".join(sample.id.removeprefix("set/")[0] for sample in read_rows(out, SAMPLES_FILE, Sample))


def problem_of(given: object, cwd: Path) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        make_plan(CONFIG, [entry(given)], cwd=cwd)
    (problem,) = caught.value.problems
    return problem.where.removeprefix("multidatabackend.json[0]."), problem.message


FILTERS = [
    ({"collection": ["photo"]}, "015", '2 by collection "scan" (2.png, 4.png), 1 by collection null (3.png)'),
    ({"collection": ["photo", "scan"], "min_width": 400}, "024", "2 by min_width (1.png, 5.png), 1 by collection null"),
    ({"min_height": 321}, "4", "5 by min_height (0.png, 1.png, 2.png, …)"),
    ({"min_width": 401, "min_height": 1}, "4", "5 by min_width"),
    (
        {"quality_column": "quality", "quality_thresholds": {"aesthetic": 6}},
        "025",
        "2 by quality_thresholds.aesthetic (1.png, 4.png), 1 by quality_thresholds, as quality is empty (3.png)",
    ),
    ({"quality_column": "quality", "quality_thresholds": {"sharp": 2, "aesthetic": 1}}, "15", "by quality_thresholds"),
    ({"path_include": "re:[0-3]", "path_exclude": "2*"}, "013", "2 by path_include (4.png, 5.png), 1 by path_exclude"),
    ({"path_exclude": "0.png", "collection": "photo"}, "15", "1 by path_exclude (0.png)"),
]


@pytest.mark.parametrize(("given", "kept", "told"), FILTERS)
def test_rows_of_a_table(
    hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path, given: dict[str, Any], kept: str, told: str
) -> None:
    all_rows = rows()
    hub.repos[NAME].commit(
        {"data/train-0-of-2.parquet": table(all_rows[:4]), "data/train-1-of-2.parquet": table(all_rows[4:])}
    )
    few = {**CONFIG, "train_batch_size": 1}
    plan = make_plan(few, [entry(given)], cwd=tmp_path)
    assert plan.summary["samples"] == {"set": len(kept)}
    assert plan.summary["filtered"] == {"set": 6 - len(kept)}
    assert f"`set`: filter_func leaves out {6 - len(kept)} pictures: " in plan.markdown
    assert told in plan.markdown
    assert names_in(plan, tmp_path / "out") == kept


@pytest.mark.parametrize(("given", "kept", "told"), FILTERS[::2])
def test_pictures_of_a_folder_with_metadata(
    hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path, given: dict[str, Any], kept: str, told: str
) -> None:
    all_rows = rows()
    files = {row["image"]["path"]: row.pop("image")["bytes"] for row in all_rows}
    lines = [json.dumps({"file_name": name, **row}) for name, row in zip(files, all_rows, strict=True)]
    hub.repos[NAME].commit(files | {"metadata.jsonl": "\n".join(lines).encode()})
    plan = make_plan({**CONFIG, "train_batch_size": 1}, [entry(given)], cwd=tmp_path)
    assert plan.summary["filtered"] == {"set": 6 - len(kept)}
    assert told in plan.markdown
    assert names_in(plan, tmp_path / "out") == kept


def test_the_same_rows_from_anywhere_are_the_same_dataset(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    prints = set()
    all_rows = rows()
    kept = [row for row in all_rows if row["collection"] == "photo"]
    for data, given in ((table(all_rows), {"collection": "photo"}), (table(kept), None)):
        hub.repos[NAME].commit({"train.parquet": data})
        plan = make_plan(CONFIG, [entry(given)], cwd=tmp_path)
        prints.add(download_dataset(plan.sections.download, tmp_path / "out").fingerprint)
    assert len(prints) == 1


def test_pictures_left_out_are_not_fetched(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    all_rows = rows()
    first, second = table(all_rows[:3]), table(all_rows[3:])
    hub.repos[NAME].commit({"train-0.parquet": first, "train-1.parquet": second})
    plan = make_plan(CONFIG, [entry({"path_include": ["0", "1"]})], cwd=tmp_path)
    spans = [span.removeprefix("bytes=").split("-") for span in proxy.ranges]
    assert sum(int(stop) - int(start) for start, stop in spans) < len(first)
    proxy.ranges.clear()
    rule = proxy.fail("GET /_cdn/.*/train-1.parquet", "status", 404, times=99)
    with closing(HubSource(plan.sections.download.datasets[0])) as source:
        rule.times = 0
        listed = source.listing().pictures
        rule.times = 99
        assert [item.name for item in listed] == ["0.png", "1.png"]
        for item in listed:
            assert source.read(item) == all_rows[int(item.name[0])]["image"]["bytes"]
    assert rule.times == 99


def test_a_list_of_collections_and_lists_in_the_column(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    tagged: list[list[str] | None] = [["a", "b"], ["b"], [], None, ["c", "a"], ["a"]]
    hub.repos[NAME].commit(
        {"train.parquet": table([row | {"collection": tags} for row, tags in zip(rows(), tagged, strict=True)])}
    )
    plan = make_plan(CONFIG, [entry({"collection": ["a", "x"]})], cwd=tmp_path)
    assert names_in(plan, tmp_path / "out") == "045"


def test_names_of_rows_do_not_depend_on_the_filter(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    twice = [
        row | {"image": row["image"] | {"path": "same.png"}, "filename": f"deep/{n}.png"}
        for n, row in enumerate(rows())
    ]
    hub.repos[NAME].commit({"train.parquet": table(twice)})
    plan = make_plan({**CONFIG, "train_batch_size": 1}, [entry({"path_include": "deep/2.png"})], cwd=tmp_path)
    download_dataset(plan.sections.download, tmp_path / "out")
    (sample,) = read_rows(tmp_path / "out", SAMPLES_FILE, Sample)
    assert sample.id == "set/train/0001-000000"


def test_max_num_samples_counts_what_is_left(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    hub.repos[NAME].commit({"train.parquet": table(rows())})
    plan = make_plan(CONFIG, [entry({"collection": "photo"}, max_num_samples=2)], cwd=tmp_path)
    assert plan.summary["samples"] == {"set": 2}
    assert set(names_in(plan, tmp_path / "out")) <= set("015")


def test_what_a_filter_cannot_compare_is_named(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    bare = [{"image": row["image"], "text": row["text"]} for row in rows()]
    everything = {"collection": "photo", "min_width": 1, "quality_thresholds": {"aesthetic": 5}}
    hub.repos[NAME].commit({"train.parquet": table(bare)})
    assert problem_of(everything, tmp_path) == (
        "dataset_name",
        "train.parquet has no column 'collection' (filter_func.collection) and no column 'quality_assessment' "
        "(filter_func.quality_thresholds) and no column 'width' (filter_func.min_width); it has image, text.",
    )
    wrong = [row | {"quality_assessment": "good", "width": "wide", "collection": "photo"} for row in bare]
    hub.repos[NAME].commit({"train.parquet": table(wrong)})
    assert problem_of(everything, tmp_path) == (
        "filter_func",
        "train.parquet, row 0 of group 0: column 'quality_assessment' holds \"good\"; filter_func.quality_thresholds "
        "needs an object of numbers; column 'width' holds \"wide\"; filter_func.min_width needs numbers.",
    )
    text = [row | {"quality_assessment": {"aesthetic": "high"}} for row in bare]
    hub.repos[NAME].commit({"train.parquet": table(text)})
    where, message = problem_of({"quality_thresholds": {"aesthetic": 5}}, tmp_path)
    assert where == "filter_func"
    assert "column 'quality_assessment.aesthetic' holds \"high\"; filter_func.quality_thresholds.aesthetic" in message
    unnamed = [{"image": row["image"]["bytes"], "text": row["text"]} for row in rows()]
    hub.repos[NAME].commit({"train.parquet": table(unnamed)})
    where, message = problem_of({"path_include": "a"}, tmp_path)
    assert where == "filter_func"
    assert "rows have no names for filter_func to match" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"collection": "photos"}, 'leaves out all 6 pictures of alice/rings: 3 by collection "photo" (0.png'),
        ({"collection": 3}, 'by collection "scan" (2.png, 4.png), 1 by collection null'),
        (
            {"quality_column": "quality", "quality_thresholds": {"aestetic": 1}},
            "5 by quality_thresholds, as quality has no 'aestetic' (it has aesthetic, sharp)",
        ),
        ({"min_width": 9000}, "6 by min_width (0.png, 1.png, 2.png, …); loosen or correct it."),
        ({"path_include": "*.jpg"}, "6 by path_include"),
    ],
)
def test_a_filter_that_leaves_nothing(
    hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    hub.repos[NAME].commit({"train.parquet": table(rows())})
    where, told = problem_of(given, tmp_path)
    assert where == "filter_func"
    assert message in told


def test_folders_without_columns_say_so(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    files = {f"{index}.png": png(index) for index in range(3)}
    hub.repos[NAME].commit(files)
    assert problem_of({"collection": "a", "min_height": 5}, tmp_path) == (
        "filter_func",
        "it has no parquet files of pictures and no metadata file with the columns of filter_func.collection and "
        "filter_func.min_height.",
    )
    csv = b"file_name,text,collection,width\n0.png,zero,a,400\n1.png,one,a,12\n"
    hub.repos[NAME].commit(files | {"metadata.csv": csv})
    plan = make_plan({**CONFIG, "train_batch_size": 1}, [entry({"collection": "a", "min_width": 100})], cwd=tmp_path)
    assert names_in(plan, tmp_path / "out") == "0"
    assert "1 by min_width (1.png), 1 by collection null (2.png)" in plan.markdown
    hub.repos[NAME].commit(files | {"metadata.csv": csv.replace(b"400", b"wide")})
    where, message = problem_of({"collection": "a", "min_width": 100}, tmp_path)
    assert (where, message) == (
        "filter_func",
        "0.png: column 'width' holds \"wide\"; filter_func.min_width needs numbers.",
    )


def test_every_entry_is_told_at_once(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    hub.repos[NAME].commit({"train.parquet": table(rows())})
    entries = [entry({"collection": "x"}), entry({"min_width": 9000}, id="b"), entry({"path_include": "x"}, id="c")]
    with pytest.raises(ConfigError) as caught:
        make_plan(CONFIG, entries, cwd=tmp_path)
    assert [problem.where for problem in caught.value.problems] == [
        f"multidatabackend.json[{index}].filter_func" for index in range(3)
    ]


def test_the_download_alone_says_it_too(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    hub.repos[NAME].commit({"train.parquet": table(rows())})
    settings = DatasetSource.model_validate(
        {"id": "set", "type": "huggingface", "hub": {"name": NAME}, "rows": {"min_width": 9000}}
    )
    with pytest.raises(DatasetError, match="dataset 'set': filter_func leaves out all 6 pictures of alice/rings"):
        download_dataset(DownloadSection(datasets=(settings,)), tmp_path / "out")
