"""``filter_func`` and ``composite_image_config`` in the data file."""

from typing import Any

import pytest

from kubetuner.config.load import load
from kubetuner.config.sections.sources import Composite, DatasetSource, DownloadSection, PathFilter, RowFilter
from kubetuner.errors import ConfigError

CONFIG = {"model_type": "full", "model_family": "sdxl"}
WHERE = "multidatabackend.json[0]."


def entry(hub: bool = False, **more: Any) -> dict[str, Any]:
    there = {"type": "huggingface", "dataset_name": "a/b"} if hub else {"instance_data_dir": "pictures"}
    return {"id": "a", **there, **more}


def source_of(given: dict[str, Any]) -> DatasetSource:
    return load(CONFIG, [given]).sections.download.datasets[0]


def problems_of(given: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(CONFIG, [given])
    return {problem.where.removeprefix(WHERE): problem.message for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        ({"path_include": "ring"}, PathFilter(include=("ring",), match="auto")),
        ({"path_include": ["a", ""], "path_exclude": "*.png"}, PathFilter(include=("a",), exclude=("*.png",))),
        ({"path_exclude": "x", "path_match": "exact"}, PathFilter(exclude=("x",), match="exact")),
        ({"path": {"include": "ring"}}, PathFilter(include=("ring",), match="contains")),
        ({"path": {"exclude": ["a", "b"], "mode": "glob"}}, PathFilter(exclude=("a", "b"), match="glob")),
        ({"path": {"include": "a"}, "path_exclude": "*b"}, PathFilter(include=("a",), exclude=("*b",), match="auto")),
        ({"path_include": [], "path": None}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("hub", [False, True])
def test_names(given: dict[str, Any], paths: PathFilter | None, hub: bool) -> None:
    source = source_of(entry(hub, filter_func=given))
    assert (source.paths, source.rows) == (paths, None)


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({"collection": ["x", 3]}, RowFilter(collection=("x", 3))),
        ({"collection": "x"}, RowFilter(collection=("x",))),
        ({"min_width": 512, "min_height": 256.0}, RowFilter(min_width=512, min_height=256)),
        (
            {"quality_thresholds": {"sharp": 1, "aesthetic": 5.5}, "quality_column": "scores"},
            RowFilter(quality_thresholds=(("sharp", 1.0), ("aesthetic", 5.5)), quality_column="scores"),
        ),
        (
            {"quality_thresholds": {"a": 0}},
            RowFilter(quality_thresholds=(("a", 0),), quality_column="quality_assessment"),
        ),
    ],
)
def test_columns(given: dict[str, Any], rows: RowFilter) -> None:
    assert source_of(entry(True, filter_func=given)).rows == rows
    nested = {"id": "a", "type": "huggingface", "huggingface": {"dataset_name": "a/b", "filter_func": given}}
    assert source_of(nested).rows == rows


@pytest.mark.parametrize("nested", [False, True])
def test_a_composite(nested: bool) -> None:
    for given, composite in (
        ({"enabled": True, "image_count": 3, "select_index": 2}, Composite(count=3, index=2)),
        ({"enabled": True, "image_count": 2}, Composite(count=2, index=0)),
        ({"enabled": False, "image_count": 1}, None),
        ({"image_count": 3}, None),
        (None, None),
    ):
        keys = {"composite_image_config": given}
        wrapped = {"id": "a", "type": "huggingface", "huggingface": {"dataset_name": "a/b", **keys}}
        assert source_of(wrapped if nested else entry(**keys)).composite == composite


def test_a_section_comes_back_from_json() -> None:
    rows = {"collection": ["3", 3], "min_width": 5, "quality_thresholds": {"b": 1, "a": 0.5}, "path_include": "re:x"}
    tiles = {"enabled": True, "image_count": 3, "select_index": 1}
    section = load(CONFIG, [entry(True, filter_func=rows, composite_image_config=tiles)]).sections.download
    assert DownloadSection.from_json(section.to_json()) == section
    assert section.to_json() != load(CONFIG, [entry(True)]).sections.download.to_json()


def test_masks_may_be_filtered_and_tiles() -> None:
    masks = entry(
        id="m", dataset_type="conditioning", conditioning_type="mask",
        filter_func={"path_include": "*_mask.png"}, composite_image_config={"enabled": True, "image_count": 2},
    )  # fmt: skip
    (found,) = load(CONFIG, [entry(conditioning_data="m"), masks]).sections.download.masks
    assert found.source.paths == PathFilter(include=("*_mask.png",))
    assert found.source.composite == Composite(count=2, index=0)


@pytest.mark.parametrize(
    ("given", "where", "message"),
    [
        (3, "", "is a int; expected an object"),
        ({"colection": "x"}, ".colection", "did you mean 'collection'?"),
        ({"path": "x"}, ".path", "is a str; expected an object"),
        ({"path": {"includes": "x"}}, ".path.includes", "did you mean 'include'?"),
        ({"path_match": "fuzzy", "path_include": "a"}, ".path_match", "expected 'auto' or 'contains' or 'glob'"),
        ({"path_match": "glob"}, ".path_match", "would not be used; name patterns"),
        ({"path": {"mode": "glob"}}, ".path.mode", "would not be used"),
        ({"path_include": 5}, ".path_include", "expected a string or a list of strings"),
        ({"path_include": "re:("}, ".path_include", "holds 're:(', which is no regular expression"),
        ({"path_exclude": ["fine", "("], "path_match": "regex"}, ".path_exclude", "holds '(', which is no regular"),
        ({"path": {"exclude": "(", "mode": "regex"}}, ".path.exclude", "holds '('"),
        ({"path_include": "a", "path": {"include": "b"}}, ".path.include", "is the same key as 'path_include'"),
        ({"collection": []}, ".collection", "expected a name or a list of names"),
        ({"collection": ["x", 1.5]}, ".collection", "expected a name or a list of names"),
        ({"collection": {"a": 1}}, ".collection", "expected a name or a list of names"),
        ({"quality_thresholds": {}}, ".quality_thresholds", 'expected an object such as {"aesthetic": 5.5}'),
        ({"quality_thresholds": 5}, ".quality_thresholds", "expected an object"),
        ({"quality_thresholds": {"a": "5"}}, ".quality_thresholds.a", "is '5'; expected a number"),
        ({"quality_thresholds": {"a": True}}, ".quality_thresholds.a", "is True; expected a number"),
        ({"quality_column": "q", "collection": "x"}, ".quality_column", "would not be used; set quality_thresholds"),
        ({"min_width": 0}, ".min_width", "at least 1"),
        ({"min_height": "512"}, ".min_height", "without quotes"),
    ],
)
def test_mistakes_in_a_filter(given: object, where: str, message: str) -> None:
    found = problems_of(entry(True, filter_func=given))
    assert list(found) == [f"filter_func{where}"]
    assert message in found[f"filter_func{where}"]


def test_folders_have_no_columns_and_all_is_told_at_once() -> None:
    given = {"min_width": 512, "collection": "x", "quality_thresholds": {"a": "b"}, "path_include": "re:["}
    found = problems_of(entry(filter_func=given, composite_image_config={"enabled": 1}))
    keys = ("collection", "min_width", "quality_thresholds", "quality_thresholds.a", "path_include")
    assert sorted(found) == sorted([*(f"filter_func.{key}" for key in keys), "composite_image_config.enabled"])
    assert "reads a column of a hub dataset, and type is local; minimum_image_size" in found["filter_func.min_width"]


@pytest.mark.parametrize(
    ("given", "where", "message"),
    [
        (True, "", "is a bool; expected an object"),
        ({"enabled": True}, ".image_count", "is missing; expected how many"),
        ({"enabled": True, "image_count": 1}, ".image_count", "is 1; expected how many pictures stand side by side"),
        ({"enabled": True, "image_count": "2"}, ".image_count", "without quotes"),
        ({"enabled": True, "image_count": 2, "select_index": 2}, ".select_index", "is 2; expected at most 1"),
        ({"enabled": True, "image_count": 2, "select_index": -1}, ".select_index", "at least 0"),
        ({"enabled": True, "image_count": 2, "index": 0}, ".index", "is not a known key"),
        ({"enabled": "true", "image_count": 2}, ".enabled", "without quotes"),
    ],
)
def test_mistakes_in_a_composite(given: object, where: str, message: str) -> None:
    found = problems_of(entry(True, composite_image_config=given))
    assert list(found) == [f"composite_image_config{where}"]
    assert message in found[f"composite_image_config{where}"]
