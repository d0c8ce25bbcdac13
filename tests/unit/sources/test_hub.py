"""Dataset repositories on a hub over HTTP, behind a proxy that misbehaves."""

import io
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kubetuner.config.sections.sources import DatasetSource, DownloadSection
from kubetuner.errors import ConfigError, DatasetError
from kubetuner.sources import parquet
from kubetuner.sources.base import ItemError
from kubetuner.sources.hub import HubSource
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from tests.servers.dataset_hub import DatasetHub
from tests.servers.faults import FaultyProxy

NAME = "alice/rings"
CONFIG = {"model_type": "full", "model_family": "pixart_sigma", "train_batch_size": 2, "max_train_steps": 10}
Open = Callable[..., HubSource]


@pytest.fixture
def opened(proxy: FaultyProxy) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda **more: stack.enter_context(closing(HubSource(settings(**more))))


def settings(hub: dict[str, Any] | None = None, **more: Any) -> DatasetSource:
    return DatasetSource.model_validate(
        {"id": "set", "type": "huggingface", "hub": {"name": NAME} | (hub or {}), **more}
    )


def png(seed: int, size: tuple[int, int] = (400, 320)) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 40 + seed).convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def pictures(count: int = 6) -> dict[str, bytes]:
    names = [f"{'deep/er/' if index % 2 else ''}a_picture_{index}" for index in range(count)]
    texts = {f"{name}.txt": f"picture {index}\nünother".encode() for index, name in enumerate(names)}
    return {f"{name}.png": png(index) for index, name in enumerate(names)} | texts


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def table(rows: list[dict[str, Any]], group: int = 2) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream, row_group_size=group)
    return stream.getvalue()


def rows_of(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": data, "path": name}, "text": files[name.replace(".png", ".txt")].decode().splitlines()}
        for name, data in files.items()
        if name.endswith(".png")
    ]


def test_a_folder_is_the_same_dataset_as_here(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    files = pictures()
    write(tmp_path / "set", files)
    hub.repos[NAME].commit({f"rings/{name}": data for name, data in files.items()} | {"README.md": b"x", "x.png": b""})
    local = DatasetSource(id="set", instance_data_dir=str(tmp_path / "set"), caption_strategy="textfile")
    there = settings(instance_data_dir="rings", caption_strategy="textfile")
    first, second = (
        download_dataset(DownloadSection(datasets=(source,)), tmp_path / source.type) for source in (local, there)
    )
    assert first.fingerprint == second.fingerprint
    assert first.num_samples == 6


@pytest.mark.parametrize("readers", [1, 8])
def test_parquet_files_are_the_same_dataset_too(
    hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers: int
) -> None:
    files = pictures(9)
    write(tmp_path / "set", files)
    rows = rows_of(files)
    hub.repos[NAME].commit(
        {
            "data/train-00000-of-00003.parquet": table(rows[5:]),
            "data/train-00001-of-00003.parquet": table(rows[:4]),
            "data/train-00002-of-00003.parquet": table(rows[4:5]),
            "data/test-00000-of-00001.parquet": table(rows[:1]),
        }
    )
    monkeypatch.setattr(HubSource, "readers", readers)
    monkeypatch.setattr(parquet, "_FILES_KEPT", 1)
    monkeypatch.setattr(parquet, "CHUNK_BYTES", 100_000)
    local = DatasetSource(id="set", instance_data_dir=str(tmp_path / "set"), caption_strategy="textfile")
    there = settings({"caption_column": "text"}, caption_strategy="huggingface")
    first, second = (
        download_dataset(DownloadSection(datasets=(source,)), tmp_path / source.type) for source in (local, there)
    )
    assert first.fingerprint == second.fingerprint
    assert first.num_samples == 9


def test_plan_pins_the_commit(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    commit = hub.repos[NAME].commit(pictures())
    entry = {"id": "set", "type": "huggingface", "dataset_name": NAME, "resolution": 128}
    plan = make_plan(CONFIG, [entry], cwd=tmp_path)
    assert plan.summary["samples"] == {"set": 6}
    assert set(proxy.ranges) == {"bytes=0-65535"}
    assert plan.sections.download.datasets[0].revision == commit
    hub.repos[NAME].commit({"other.png": png(9)})
    assert download_dataset(plan.sections.download, tmp_path / "out").num_samples == 6
    again = make_plan(CONFIG, [entry | {"revision": commit}], cwd=tmp_path)
    assert again.sections.download.datasets[0].revision == commit


def test_plan_reads_sizes_from_a_table(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    rows = [{"image": {"bytes": os.urandom(300_000), "path": None}, "width": 400, "height": 320} for _ in range(4)]
    hub.repos[NAME].commit({"part.parquet": table(rows)})
    entry = {"id": "set", "type": "huggingface", "dataset_name": NAME, "resolution": 128}
    plan = make_plan(CONFIG, [entry], cwd=tmp_path)
    assert plan.summary["samples"] == {"set": 4}
    spans = [span.removeprefix("bytes=").split("-") for span in proxy.ranges]
    assert sum(int(stop) - int(start) for start, stop in spans) < 600_000


def test_rows_without_names_and_plain_bytes(hub: DatasetHub, opened: Open) -> None:
    rows = [{"picture": b"one"}, {"picture": None}, {"picture": b"three"}]
    hub.repos[NAME].commit({"train/0.parquet": table(rows)})
    source = opened(hub={"image_column": "picture"})
    items = source.listing().pictures
    assert [item.name for item in items] == ["train/0/0000-000000", "train/0/0000-000001", "train/0/0001-000000"]
    assert [source.read(items[0]), source.header(items[2], 2)] == [b"one", b"three"]
    with pytest.raises(ItemError, match="holds no bytes"):
        source.read(items[1])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"split": "test"}, "no parquet file of split 'test' .there are: train"),
        (
            {"image_column": "img", "caption_column": "text"},
            r"has no column 'img' \(image_column\) and no column 'text' \(caption_column\); it has image",
        ),
        ({"revision": "v2"}, "at v2 failed: there is no such dataset or revision"),
        ({"name": "alice/absent"}, "HF_TOKEN"),
    ],
)
def test_refusals(hub: DatasetHub, opened: Open, columns: dict[str, str], message: str) -> None:
    hub.repos[NAME].commit({"train.parquet": table([{"image": b"x"}])})
    with pytest.raises(DatasetError, match=message):
        opened(hub=columns).listing()


def test_private_repositories(hub: DatasetHub, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME].commit({"a.png": b"picture"})
    hub.repos[NAME].private = True
    with pytest.raises(DatasetError, match="is private: check dataset_name, and set HF_TOKEN"):
        opened().listing()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    source = opened()
    assert source.read(source.listing().pictures[0]) == b"picture"
    assert any("/resolve/" in path for path in hub.authorized)
    assert not any("/_cdn/" in path for path in hub.authorized), "the token went to another host"


@pytest.mark.parametrize("fault", [("status", 503), ("status", 429), ("cut", 3), ("reset", 0), ("corrupt", 0)])
@pytest.mark.parametrize("name", ["a.png", "a.ppm"])
def test_passing_faults_are_outlived(
    hub: DatasetHub, proxy: FaultyProxy, opened: Open, fault: tuple[Any, int], name: str
) -> None:
    hub.repos[NAME].commit({name: b"picture"})
    if fault[0] in ("status", "reset"):
        proxy.fail("GET /api/.*revision", *fault)
        proxy.fail("GET /api/.*tree", *fault)
    proxy.fail("GET /_cdn" if name == "a.png" else "GET /datasets", *fault, times=2)
    source = opened()
    (item,) = source.listing().pictures
    assert source.read(item) == b"picture"
    assert all(rule.times == 0 for rule in proxy.faults)


def test_a_damaged_table_is_fetched_again(hub: DatasetHub, proxy: FaultyProxy, opened: Open) -> None:
    hub.repos[NAME].commit({"train.parquet": table([{"image": b"picture"}])})
    source = opened()
    (item,) = source.listing().pictures
    rule = proxy.fail("GET /_cdn", "corrupt", times=2)
    assert source.read(item) == b"picture"
    assert rule.times == 0
    again = opened()
    again.listing()
    rule.times = 99
    with pytest.raises(DatasetError, match=r"train\.parquet failed 5 times, .* sha256 checksum is wrong"):
        again.read(item)


def test_a_file_that_is_no_parquet_is_named(hub: DatasetHub, opened: Open) -> None:
    whole = table([{"image": b"picture" * 1000}])
    for damaged in (b"PAR1", whole[:100] + bytes(100) + whole[200:]):
        hub.repos[NAME].commit({"data/train.parquet": damaged})
        source = opened()
        with pytest.raises(DatasetError, match=r"data/train\.parquet cannot be read as parquet"):
            source.read(source.listing().pictures[0])


def test_metadata_files_of_a_folder_hold_captions(hub: DatasetHub, opened: Open) -> None:
    hub.repos[NAME].commit(
        {
            "metadata.jsonl": ('{"file_name": "a.png", "text": "ein\u2028Ring"}\n\n'
            '{"file_name": "b.png", "text": ["x", "y"]}').encode(),
            "a.png": b"", "b.png": b"", "c.png": b"",
            "deep/metadata.csv": b'file_name,text\n./d.png,"one, two"\n', "deep/d.png": b"",
            "far/metadata.parquet": table([{"file_name": "e.png", "text": ["y", "z"]}]), "far/e.png": b"",
        }
    )  # fmt: skip
    found = {item.name: item.captions for item in opened(hub={"caption_column": "text"}).listing().pictures}
    assert found == {
        "a.png": ("ein\u2028Ring",), "b.png": ("x", "y"), "c.png": None, "deep/d.png": ("one, two",),
        "far/e.png": ("y", "z"),
    }  # fmt: skip
    assert {item.captions for item in opened().listing().pictures} == {None}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png"}', "row 1 has no column 'text' .caption_column.; it has file_name"),
        ("metadata.jsonl", b"{", "metadata.jsonl is damaged"),
        ("metadata.parquet", b"PAR1", "metadata.parquet is damaged"),
        (
            "metadata.csv",
            b"name,text\na.png,x",
            "row 1 has no column 'file_name' .the picture's path.; it has name, text",
        ),
    ],
)
def test_damaged_metadata_is_named(hub: DatasetHub, opened: Open, name: str, content: bytes, message: str) -> None:
    hub.repos[NAME].commit({name: content, "a.png": b""})
    with pytest.raises(DatasetError, match=message):
        opened(hub={"caption_column": "text"}).listing()


@pytest.mark.parametrize(
    ("split", "folders", "found"),
    [
        ("train", ("train", "test"), ["train/a.png"]),
        ("test", ("train", "test"), ["test/a.png"]),
        ("train", ("train", "boat"), ["boat/a.png", "train/a.png"]),
        ("train", ("test",), ["test/a.png"]),
    ],
)
def test_folders_that_are_all_named_after_splits_are_splits(
    hub: DatasetHub, opened: Open, split: str, folders: tuple[str, ...], found: list[str]
) -> None:
    hub.repos[NAME].commit({f"{folder}/a.{kind}": b"" for folder in folders for kind in ("png", "txt")})
    listing = opened(hub={"split": split}).listing()
    assert [item.name for item in listing.pictures] == found
    assert sorted(listing.texts) == [name.replace("png", "txt") for name in found]


def test_a_caption_that_is_no_text_is_a_skip(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    lines = b'{"file_name": "a.png", "text": "half \\ud800 a sign"}\n{"file_name": "b.png", "text": "whole"}'
    hub.repos[NAME].commit({"metadata.jsonl": lines, "a.png": png(1), "b.png": png(2)})
    entry = {
        "id": "set", "type": "huggingface", "dataset_name": NAME, "resolution": 128, "caption_column": "text",
    }  # fmt: skip
    plan = make_plan(CONFIG | {"train_batch_size": 1, "max_skipped_share": 0.5}, [entry], cwd=tmp_path)
    assert plan.summary["samples"] == {"set": 1}
    artifact = download_dataset(plan.sections.download, tmp_path / "out")
    assert [skip.name for skip in artifact.skipped] == ["set/a.png"]
    assert "not Unicode" in artifact.skipped[0].reason


def latin_words(count: int) -> pa.Array:
    """Strings that are not UTF-8, as some writers leave them."""
    offsets = pa.py_buffer(struct.pack(f"{count + 1}i", *(4 * number for number in range(count + 1))))
    return pa.StringArray.from_buffers(count, offsets, pa.py_buffer(b"caf\xe9" * count))


def test_text_that_is_not_utf8_names_the_file(hub: DatasetHub, opened: Open) -> None:
    rows = pa.table({"image": [{"bytes": png(1), "path": "a.png"}], "text": latin_words(1)})
    stream = io.BytesIO()
    pq.write_table(rows, stream)
    hub.repos[NAME].commit({"train.parquet": stream.getvalue()})
    with pytest.raises(DatasetError, match=r"train\.parquet cannot be read as parquet \('utf-8' codec"):
        opened(hub={"caption_column": "text"}).listing()
    stream = io.BytesIO()
    pq.write_table(pa.table({"file_name": ["a.png"], "text": latin_words(1)}), stream)
    hub.repos[NAME].commit({"metadata.parquet": stream.getvalue(), "a.png": b""})
    with pytest.raises(DatasetError, match=r"metadata\.parquet is damaged \('utf-8' codec"):
        opened(hub={"caption_column": "text"}).listing()


def test_a_split_without_a_folder_is_refused(hub: DatasetHub, opened: Open) -> None:
    hub.repos[NAME].commit({"train/a.png": b"", "test/a.png": b""})
    with pytest.raises(DatasetError, match=r"no folder of split 'val' \(there are: test, train\); check split"):
        opened(hub={"split": "val"}).listing()


def test_a_folder_without_the_captions_asked_for_stops_the_plan(
    hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path
) -> None:
    hub.repos[NAME].commit(pictures())
    entry = {
        "id": "set", "type": "huggingface", "dataset_name": NAME, "resolution": 128, "caption_column": "text",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"none of its 6 pictures is usable .*_0\.png: alice/rings holds no caption"):
        make_plan(CONFIG, [entry], cwd=tmp_path)


def test_the_plan_does_not_count_rows_without_a_caption(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    rows = [{"image": {"bytes": png(1), "path": f"{index}.png"}, "text": ["a", None][index]} for index in range(2)]
    hub.repos[NAME].commit({"train.parquet": table(rows)})
    entry = {
        "id": "set", "type": "huggingface", "dataset_name": NAME, "resolution": 128, "caption_column": "text",
    }  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"too few: .* = 1, needs repeats 1\.(?s:.*)1\.png: alice/rings holds no caption"
    ):
        make_plan(CONFIG, [entry], cwd=tmp_path)
    plan = make_plan(CONFIG | {"train_batch_size": 1, "max_skipped_share": 0.5}, [entry], cwd=tmp_path)
    assert plan.summary["samples"] == {"set": 1}
    assert download_dataset(plan.sections.download, tmp_path / "out").num_samples == 1


@pytest.mark.parametrize("width", [-400, 0, None])
def test_a_size_that_no_picture_has_is_measured(
    hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path, width: int | None
) -> None:
    rows = [{"image": {"bytes": png(index)}, "width": (width, 400)[index], "height": 320} for index in range(2)]
    hub.repos[NAME].commit({"part.parquet": table(rows)})
    entry = {"id": "set", "type": "huggingface", "dataset_name": NAME, "resolution": 128}
    assert make_plan(CONFIG, [entry], cwd=tmp_path).summary["buckets"] == {"set": {"1.0": 2}}


def test_a_hub_that_fails_for_good_is_named_also_inside_a_table(
    hub: DatasetHub, proxy: FaultyProxy, opened: Open
) -> None:
    hub.repos[NAME].commit({"data/train.parquet": table([{"image": b"picture"}])})
    proxy.fail("GET /_cdn", "status", 503, times=99)
    with pytest.raises(DatasetError, match=r"reading data/train\.parquet of alice/rings failed 5 times, .*status 503"):
        opened().listing()


def test_a_missing_dataset_stops_the_plan(hub: DatasetHub, proxy: FaultyProxy, tmp_path: Path) -> None:
    entries = [
        {"id": name, "type": "huggingface", "dataset_name": f"alice/{name}", "resolution": 128} for name in ("x", "y")
    ]
    with pytest.raises(ConfigError) as caught:
        make_plan(CONFIG, entries, cwd=tmp_path)
    assert [problem.where for problem in caught.value.problems] == [
        f"multidatabackend.json[{index}].dataset_name" for index in range(2)
    ]


def test_offline_is_said(hub: DatasetHub, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetError, match="HF_HUB_OFFLINE is set"):
        opened().listing()
