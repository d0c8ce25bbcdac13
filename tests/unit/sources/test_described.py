"""Captions and sizes in a parquet file, for pictures in a folder."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kubetuner.artifacts import Sample, read_rows
from kubetuner.config.sections.sources import MetadataTable
from kubetuner.errors import ConfigError, DatasetError
from kubetuner.sources.base import Item
from kubetuner.sources.described import identifiers, read_captions, read_sizes
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from kubetuner.steps.planning import told_sizes

CONFIG = {"model_type": "full", "model_family": "pixart_sigma", "train_batch_size": 2, "max_train_steps": 10}


def parquet(columns: Mapping[str, Sequence[object]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), stream)
    return stream.getvalue()


def table(**more: object) -> MetadataTable:
    return MetadataTable.model_validate({"path": "t.parquet", **more})


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
    block = {"path": "captions.parquet", "caption_column": "text"}
    return {
        "id": "set", "instance_data_dir": "pictures", "resolution": 128, "caption_strategy": "parquet",
        "metadata_backend": "parquet", "parquet": block, **more,
    }  # fmt: skip


def test_plan_and_download_agree_and_a_table_that_changes_is_found_out(tmp_path: Path) -> None:
    make_folder(tmp_path)
    path = tmp_path / "captions.parquet"
    path.write_bytes(parquet({"id": ["0", "deep/1", "2", "3"], "text": list("abcd")}))
    plan = make_plan(CONFIG, [entry()], cwd=tmp_path)
    assert plan.summary["buckets"] == {"set": {"1.0": 4}}
    first = download_dataset(plan.sections.download, tmp_path / "out")
    rows = list(read_rows(tmp_path / "out", "samples.jsonl", Sample))
    assert [(row.id, row.captions) for row in rows] == [
        ("set/0.png", ("a",)), ("set/2.png", ("c",)), ("set/deep/1.png", ("b",)), ("set/deep/3.png", ("d",)),
    ]  # fmt: skip
    path.write_bytes(parquet({"id": ["0", "deep/1", "2", "3"], "text": list("abcx")}))
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


def test_sizes_are_whole_numbers_above_zero() -> None:
    sized = table(width_column="w", height_column="h")
    data = parquet({"id": [1, 2, 3, 3, None], "w": [10, None, 5, 6, 7], "h": [20, 9, 5, 6, 7]})
    assert read_sizes(data, sized) == {"1": (10, 20), "3": (6, 6)}
    assert read_sizes(parquet({"id": [1, 2], "w": [0, 4], "h": [3, -4]}), sized) == {}
    assert read_sizes(parquet({"id": [1], "w": ["10"], "h": [10.5]}), sized) == {}
    with pytest.raises(DatasetError, match="no column 'h'; it has id, w"):
        read_sizes(parquet({"id": [1], "w": [1]}), sized)


def sized_entry(**more: object) -> dict[str, object]:
    block = {"path": "sizes.parquet", "width_column": "w", "height_column": "h"}
    return entry(caption_strategy="filename", parquet=block, **more)


def test_sizes_that_a_table_tells_save_opening_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, 8)
    names = [f"{'deep/' if index % 2 else ''}{index}" for index in range(8)]
    sizes = {"id": names, "w": [128] * 7 + [None], "h": [128] * 8}
    (tmp_path / "sizes.parquet").write_bytes(parquet(sizes))
    monkeypatch.setattr(told_sizes, "CHECKED", 2)
    for index in (1, 2, 3, 5, 6):  # Neither one of the two that are checked nor the one without a size.
        path = tmp_path / "pictures" / f"{names[index]}.png"
        path.write_bytes(b"no picture" * 100)

    plan = make_plan(CONFIG, [sized_entry()], cwd=tmp_path)

    assert plan.summary["buckets"] == {"set": {"1.0": 8}}
    assert "measured instead" not in plan.markdown


@pytest.mark.parametrize("told", [(64, 256), (129, 128)])
def test_a_table_that_tells_one_wrong_size_is_not_believed(tmp_path: Path, told: tuple[int, int]) -> None:
    make_folder(tmp_path)
    names = ["0", "deep/1", "2", "deep/3"]
    sizes = {"id": names, "w": [128, 128, told[0], 128], "h": [128, 128, told[1], 128]}
    (tmp_path / "sizes.parquet").write_bytes(parquet(sizes))

    plan = make_plan(CONFIG, [sized_entry()], cwd=tmp_path)

    assert plan.summary["buckets"] == {"set": {"1.0": 4}}
    expected = f"`set`: the table says {told[0]}x{told[1]} of 2.png, which is 128x128; every picture was measured"
    assert expected in plan.markdown
