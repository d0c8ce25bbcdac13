"""Tables of addresses and paths, against a plain HTTP server process that knows no ranges."""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kubetuner.artifacts import Sample, read_rows
from kubetuner.config.sections.sources import DatasetSource, DownloadSection
from kubetuner.errors import DatasetError
from kubetuner.sources import base
from kubetuner.sources.base import ItemError, Listing
from kubetuner.sources.table import TableSource
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from tests.servers.faults import FaultyProxy
from tests.servers.gcs import free_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the web server serves."""
    root = tmp_path_factory.mktemp("www")
    for index in range(3):
        Image.effect_noise((400, 320), 30 + index).convert("RGB").save(root / f"{index}.png")
    (root / "deep").mkdir()
    Image.new("RGB", (128, 128)).save(root / "deep" / "0.png")
    return root


@pytest.fixture(scope="module")
def web(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1):
                    break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def proxy(web: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setattr(base, "LONGEST_PAUSE_SECONDS", 0.01)
    with FaultyProxy(web) as proxy:
        yield proxy


def write(path: Path, *rows: tuple[str, Any], columns: tuple[str, str] = ("url", "text")) -> Path:
    if path.suffix == ".parquet":
        data = {name: [row[index] for row in rows] for index, name in enumerate(columns)}
        pq.write_table(pa.table(data), path)
        return path
    separator = "\t" if path.suffix == ".tsv" else ","
    lines = [separator.join(f'"{cell}"' for cell in row) for row in (columns, *rows)]
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    return path


def settings(table: Path, folder: str = "", caption_column: str = "text", **more: Any) -> DatasetSource:
    columns = {"file": str(table), "caption_column": caption_column}
    return DatasetSource.model_validate(
        {"id": "set", "type": "csv", "table": columns, "instance_data_dir": folder, "caption_strategy": "csv", **more}
    )


def listing(table: Path, **more: Any) -> Listing:
    with closing(TableSource(settings(table, **more))) as source:
        return source.listing()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_addresses_and_captions(proxy: FaultyProxy, tmp_path: Path, suffix: str) -> None:
    rows = [(f"{proxy.url}/{index}.png?signature=secret", f"Bild {index}, schön") for index in range(3)]
    table = write(tmp_path / f"t.{suffix}", *rows, (rows[0][0], "once more"))
    artifact = download_dataset(DownloadSection(datasets=(settings(table),)), tmp_path / "out")
    assert artifact.num_samples == 3
    samples = {row.id: row.captions for row in read_rows(tmp_path / "out", "samples.jsonl", Sample)}
    assert samples[f"set/{proxy.host}/0.png"] == ("Bild 0, schön", "once more")
    assert samples[f"set/{proxy.host}/2.png"] == ("Bild 2, schön",)
    assert "secret" not in (tmp_path / "out" / "samples.jsonl").read_text()


def test_paths(folder: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", ("deep/0.png", "one"), (str(folder / "1.png"), "two"), ("gone.png", "three"))
    section = DownloadSection(datasets=(settings(table, str(folder)),), max_skipped_share=0.5)
    artifact = download_dataset(section, tmp_path / "out")
    assert artifact.num_samples == 2
    assert [(skip.name, skip.reason) for skip in artifact.skipped] == [
        ("set/gone.png", "cannot be read (No such file or directory)")
    ]
    beside = write(folder / "t.csv", ("deep/0.png", "one"))
    assert [item.size for item in listing(beside).pictures] == [(folder / "deep/0.png").stat().st_size]


def test_addresses_that_differ_only_in_their_query(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", ("http://h/a?id=1", "x"), ("http://h/a?id=2", "y"), ("http://u:pw@h:8/b", "z"))
    names = [item.name for item in listing(table).pictures]
    assert names[-1] == "h:8/b"
    assert len(set(names)) == 3
    assert all(name.startswith("h/a~") for name in names[:2])


def test_lists_and_gaps_in_parquet(tmp_path: Path) -> None:
    table = write(tmp_path / "t.parquet", ("http://h/a", ["x", " y", "x"]), ("http://h/b", None))
    assert [item.captions for item in listing(table).pictures] == [("x", "y"), None]


def test_the_revision_covers_addresses_and_captions(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    seen = set()
    for rows in ([("http://h/a", "x")], [("http://h/a", "y")], [("http://h/b", "x")], [("http://h/a?b", "x")]):
        seen.add(listing(write(table, *rows)).revision)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("adress,text\na,b", r"no column 'url' \(csv_url_column\); it has adress, text"),
        ("url,caption\na,b", r"no column 'text' \(csv_caption_column\)"),
        ("url,text\n,b\nftp://x/y,c\n", r"rows without url: 1; rows that are neither .*: 2 \(ftp\)"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DatasetError, match=message):
        listing(tmp_path / "t.csv")


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"cannot be read \(No such file.*check csv_file"):
        listing(tmp_path / "gone.csv")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DatasetError, match="no readable parquet file"):
        listing(tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_bytes("url,text\na,Stück".encode("latin-1"))
    with pytest.raises(DatasetError, match="damaged"):
        listing(tmp_path / "t.csv")


@pytest.mark.parametrize("fault", [("status", 503), ("cut", 100), ("reset", 0)])
def test_passing_faults_are_outlived(proxy: FaultyProxy, folder: Path, tmp_path: Path, fault: tuple[Any, int]) -> None:
    table = write(tmp_path / "t.csv", (f"{proxy.url}/1.png", "x"))
    rule = proxy.fail("GET /1.png", *fault, times=2)
    with closing(TableSource(settings(table))) as source:
        (item,) = source.listing().pictures
        assert source.read(item) == (folder / "1.png").read_bytes()
        assert source.header(item, 100) == (folder / "1.png").read_bytes()[:100]
    assert rule.times == 0
    assert proxy.ranges == ["bytes=0-99"]


def test_one_dead_address_is_a_skip(proxy: FaultyProxy, tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{free_port()}/a.png"
    table = write(tmp_path / "t.csv", (f"{proxy.url}/gone.png?key=secret", "x"), (dead, "y"))
    with closing(TableSource(settings(table))) as source:
        one, other = sorted(source.listing().pictures, key=lambda item: "gone" not in item.name)
        with pytest.raises(ItemError, match=r"cannot be fetched \(status 404\)"):
            source.read(one)
        assert sum("gone" in line for line in proxy.requests) == 1
        with pytest.raises(ItemError, match=r"failed 5 times, at last with: ConnectionError"):
            source.read(other)


@pytest.mark.parametrize("address", ["http://[bad/a.png?key=secret", "a\0b.png", "https:///a.png", "http://a b/c.png"])
def test_an_address_that_is_none_is_a_skip(proxy: FaultyProxy, tmp_path: Path, address: str) -> None:
    table = write(tmp_path / "t.parquet", (address, "x"), (f"{proxy.url}/1.png", "y"))
    with closing(TableSource(settings(table))) as source:
        bad, good = sorted(source.listing().pictures, key=lambda item: item.name.endswith("1.png"))
        assert "secret" not in bad.name
        with pytest.raises(ItemError, match="cannot be"):
            source.header(bad, 100)
        assert source.read(good)


@pytest.mark.parametrize("column", ["url", "text"])
def test_text_that_is_not_utf8_names_the_table(tmp_path: Path, column: str) -> None:
    words = pa.StringArray.from_buffers(1, pa.py_buffer(bytes([0, 0, 0, 0, 4, 0, 0, 0])), pa.py_buffer(b"caf\xe9"))
    pq.write_table(pa.table({"url": ["a.png"], "text": ["a"]} | {column: words}), tmp_path / "t.parquet")
    with pytest.raises(DatasetError, match=r"t\.parquet is no readable parquet file \('utf-8' codec"):
        listing(tmp_path / "t.parquet")


def test_plan_measures_over_the_web(proxy: FaultyProxy, tmp_path: Path) -> None:
    write(tmp_path / "t.csv", *((f"{proxy.url}/{index}.png", "x") for index in range(3)))
    config = {"model_type": "full", "model_family": "pixart_sigma", "train_batch_size": 2, "max_train_steps": 10}
    entry = {"id": "set", "type": "csv", "csv_file": "t.csv", "csv_caption_column": "text", "resolution": 128}
    plan = make_plan(config, [entry], cwd=tmp_path)
    assert plan.summary["samples"] == {"set": 3}
    assert len(proxy.requests) == 3
    (source,) = plan.sections.download.datasets
    assert source.table is not None
    assert source.table.file == str(tmp_path / "t.csv")
    assert download_dataset(plan.sections.download, tmp_path / "out").num_samples == 3
    write(tmp_path / "t.csv", (f"{proxy.url}/0.png", "x"))
    with pytest.raises(DatasetError, match="it has changed after the run was planned"):
        download_dataset(plan.sections.download, tmp_path / "out")
