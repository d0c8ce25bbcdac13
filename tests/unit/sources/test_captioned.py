"""Captions in a parquet file, for pictures in a folder."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kubetuner.artifacts import Sample, read_rows
from kubetuner.config.sections.sources import CaptionTable
from kubetuner.errors import ConfigError, DatasetError
from kubetuner.sources.base import Item
from kubetuner.sources.captioned import identifiers, read_captions
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan

CONFIG = {"model_type": "full", "model_family": "pixart_sigma", "train_batch_size": 2, "max_train_steps": 10}


def parquet(columns: Mapping[str, Sequence[object]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), stream)
    return stream.getvalue()


def table(**more: object) -> CaptionTable:
    return CaptionTable.model_validate({"path": "t.parquet", **more})


def test_rows_are_found_by_their_identifier() -> None:
    data = parquet({"id": [1, 2, 2, 3], "description": ["one", "two", " also two ", None]})
    assert read_captions(data, table()) == {"1": ("one",), "2": ("two", "also two")}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"a": "x", "b": "y", "f": "z"}, ("x", "y")),
        ({"a": "x", "b": "", "f": "z"}, ("x",)),
        ({"a": "x", "b": "x", "f": None}, ("x",)),
        ({"a": None, "b": "", "f": "z"}, ("z",)),
        ({"a": ["x", "w"], "b": None, "f": "z"}, ("x", "w")),
        ({"a": None, "b": "", "f": None}, ("",)),
        ({"a": None, "b": None, "f": None}, None),
    ],
)
def test_columns_and_the_fallback(row: dict[str, object], expected: tuple[str, ...] | None) -> None:
    lists = isinstance(row["a"], list)
    columns = {
        "id": pa.array(["k"]),
        "a": pa.array([row["a"]], pa.list_(pa.string()) if lists else pa.string()),
        "b": pa.array([row["b"]], pa.string()),
        "f": pa.array([row["f"]], pa.string()),
    }
    settings = table(caption_columns=("a", "b"), fallback_caption_column="f")
    assert read_captions(parquet(columns), settings).get("k") == expected


def test_bad_tables_are_named() -> None:
    with pytest.raises(DatasetError, match=r"no column 'description' and no column 'tags'; it has id, text"):
        read_captions(parquet({"id": [1], "text": ["x"]}), table(fallback_caption_column="tags"))
    with pytest.raises(DatasetError, match=r"t\.parquet is no readable parquet file"):
        read_captions(b"PAR1 no", table())


def test_a_picture_is_called_by_its_path_or_by_a_name_that_is_its_own() -> None:
    pictures = [Item(name) for name in ("a/1.png", "b/1.png", "b/2.v1.jpg", "notes")]
    assert identifiers(pictures, table()) == {
        "a/1.png": ("a/1",),
        "b/1.png": ("b/1",),
        "b/2.v1.jpg": ("b/2.v1", "2.v1"),
        "notes": ("notes", "notes"),
    }
    assert identifiers(pictures[2:3], table(identifier_includes_extension=True))["b/2.v1.jpg"] == (
        "b/2.v1.jpg",
        "2.v1.jpg",
    )


def make_folder(root: Path, count: int = 4) -> None:
    for index in range(count):
        path = root / "pictures" / ("deep" if index % 2 else ".") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((128, 128), 40 + index).convert("RGB").save(path)


def entry(**more: object) -> dict[str, object]:
    block = {"path": "captions.parquet", "caption_column": "text", "width_column": "w", "height_column": "h"}
    return {
        "id": "set", "instance_data_dir": "pictures", "resolution": 128, "caption_strategy": "parquet",
        "metadata_backend": "parquet", "parquet": block, **more,
    }  # fmt: skip


def test_plan_and_download_agree_and_a_table_that_changes_is_found_out(tmp_path: Path) -> None:
    make_folder(tmp_path)
    path = tmp_path / "captions.parquet"
    # Wrong sizes in the table do not matter: they are read from the pictures.
    path.write_bytes(parquet({"id": ["0", "deep/1", "2", "3"], "text": list("abcd"), "w": [1] * 4, "h": [9] * 4}))
    plan = make_plan(CONFIG, [entry()], cwd=tmp_path)
    assert plan.summary["buckets"] == {"set": {"1.0": 4}}
    assert "sizes are read from the pictures themselves" in plan.markdown
    first = download_dataset(plan.sections.download, tmp_path / "out")
    rows = list(read_rows(tmp_path / "out", "samples.jsonl", Sample))
    assert [(row.id, row.captions) for row in rows] == [
        ("set/0.png", ("a",)), ("set/2.png", ("c",)), ("set/deep/1.png", ("b",)), ("set/deep/3.png", ("d",)),
    ]  # fmt: skip
    path.write_bytes(parquet({"id": ["0", "deep/1", "2", "3"], "text": list("abcx"), "w": [1] * 4, "h": [9] * 4}))
    os.utime(path, ns=(2**61, 2**61))
    with pytest.raises(DatasetError, match=r"written since: .*captions\.parquet"):
        download_dataset(plan.sections.download, tmp_path / "out")
    again = make_plan(CONFIG, [entry()], cwd=tmp_path)
    assert download_dataset(again.sections.download, tmp_path / "out").fingerprint != first.fingerprint


def test_pictures_that_the_table_does_not_know_are_left_out(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "captions.parquet").write_bytes(parquet({"id": ["0", "1", "2"], "text": ["a", "b", "c"]}))
    with pytest.raises(ConfigError) as caught:
        make_plan(CONFIG, [entry()], cwd=tmp_path)
    expected = "1 of 4 pictures cannot be used (deep/3.png: "
    assert expected in str(caught.value)
    assert "has no caption for it: no row whose id is its path without extension" in str(caught.value)
    plan = make_plan(CONFIG | {"max_skipped_share": 0.5}, [entry()], cwd=tmp_path)
    assert plan.summary["skipped"] == {"set": 1}
    artifact = download_dataset(plan.sections.download, tmp_path / "out")
    assert [skip.name for skip in artifact.skipped] == ["set/deep/3.png"]
    assert "no row whose id is its path" in artifact.skipped[0].reason


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    make_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"captions\.parquet cannot be read"):
        make_plan(CONFIG, [entry()], cwd=tmp_path)
