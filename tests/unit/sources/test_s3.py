"""A bucket on a moto server process, behind a proxy that misbehaves."""

import io
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.config import Config
from PIL import Image

from kubetuner.config.sections.sources import DatasetSource, DownloadSection
from kubetuner.errors import DatasetError
from kubetuner.sources import base, s3
from kubetuner.sources.s3 import S3Source
from kubetuner.sources.switch import open_source
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from tests.servers.faults import FaultyProxy
from tests.servers.gcs import free_port

BUCKET = "pictures"
CONFIG = {"model_type": "full", "model_family": "pixart_sigma", "train_batch_size": 2, "max_train_steps": 10}


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    host = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", host.split(":")[1]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://{host}/moto-api/", timeout=1):
                    break
            except OSError:
                assert process.poll() is None, "moto ended"
                time.sleep(0.05)
        yield host
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setattr(base, "LONGEST_PAUSE_SECONDS", 0.01)


Put = Callable[[dict[str, bytes]], None]


@pytest.fixture
def put(moto: str) -> Iterator[Put]:
    """Writes objects below ``set/one/``, past the proxy."""
    # Without the checksums of new clients: older objects have none either.
    plain = Config(request_checksum_calculation="when_required")
    client = boto3.client("s3", endpoint_url=f"http://{moto}", region_name="us-east-1", config=plain)
    client.create_bucket(Bucket=BUCKET)

    def put(files: dict[str, bytes]) -> None:
        for name, content in files.items():
            client.put_object(Bucket=BUCKET, Key=f"set/one/{name}", Body=content, ACL="public-read")

    yield put
    urllib.request.urlopen(urllib.request.Request(f"http://{moto}/moto-api/reset", method="POST")).close()
    client.close()


@pytest.fixture
def proxy(moto: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(moto) as proxy:
        yield proxy


Open = Callable[[], S3Source]


@pytest.fixture
def opened(proxy: FaultyProxy) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(S3Source(settings(proxy.url))))


def settings(endpoint: str, name: str = BUCKET, **more: Any) -> DatasetSource:
    bucket = {"name": name, "endpoint_url": endpoint}
    return DatasetSource.model_validate(
        {"id": "set", "type": "aws", "bucket": bucket, "instance_data_dir": "set/one", **more}
    )


def make_folder(root: Path) -> dict[str, bytes]:
    for index in range(4):
        path = root / ("deep" if index % 2 else ".") / f"picture_{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((400, 320), 40 + index).convert("RGB").save(path)
        path.with_suffix(".txt").write_text(f"picture {index}")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_same_data_is_the_same_dataset(
    put: Put, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(make_folder(tmp_path / "set") | {".hidden/a.png": b"", "notes.md": b""})
    monkeypatch.setattr(s3, "PAGE_SIZE", 3)
    local = DatasetSource(id="set", instance_data_dir=str(tmp_path / "set"), caption_strategy="textfile")
    there = settings(proxy.url, caption_strategy="textfile")
    first, second = (
        download_dataset(DownloadSection(datasets=(source,)), tmp_path / source.type) for source in (local, there)
    )
    assert first.fingerprint == second.fingerprint
    assert sum("list-type=2" in line for line in proxy.requests) == 4


def test_plan_reads_beginnings_only(put: Put, proxy: FaultyProxy, tmp_path: Path) -> None:
    put(make_folder(tmp_path / "set"))
    entry = {
        "id": "set", "type": "aws", "aws_bucket_name": BUCKET, "aws_endpoint_url": proxy.url,
        "instance_data_dir": "set/one", "resolution": 128,
    }  # fmt: skip
    plan = make_plan(CONFIG, [entry], cwd=tmp_path)
    assert plan.summary["samples"] == {"set": 4}
    assert set(proxy.ranges) == {"bytes=0-65535"}
    assert "something" not in plan.sections.to_json()
    assert download_dataset(plan.sections.download, tmp_path / "out").num_samples == 4
    time.sleep(1.1)  # times of objects are whole seconds
    put({"late.png": b"x"})
    assert download_dataset(plan.sections.download, tmp_path / "out").num_samples == 4
    put({"picture_0.png": b"x"})
    with pytest.raises(DatasetError, match=r"written since: late\.png, picture_0\.png"):
        download_dataset(plan.sections.download, tmp_path / "out")


@pytest.mark.parametrize("fault", [("status", 503), ("cut", 100), ("reset", 0), ("corrupt", 0)])
def test_passing_faults_are_outlived(put: Put, proxy: FaultyProxy, opened: Open, fault: tuple[Any, int]) -> None:
    content = os.urandom(4000)
    put({"a.png": content})
    if fault[0] in ("status", "reset"):
        proxy.fail("GET .*list-type=2", *fault)
    proxy.fail(r"GET .*a\.png", *fault)
    source = opened()
    (item,) = source.listing().pictures
    assert source.read(item) == content
    assert all(rule.times == 0 for rule in proxy.faults)


def test_lasting_faults_are_told(put: Put, proxy: FaultyProxy, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    put({"a.png": b"picture"})
    monkeypatch.setattr(s3, "REQUEST_ATTEMPTS", 2)
    source = opened()
    (item,) = source.listing().pictures
    for kind, value, message in (
        ("corrupt", 0, r"reading s3://pictures/set/one/a\.png failed 5 times.*a\.png arrived damaged"),
        ("status", 503, "answered 503 2 times; try again later"),
        ("status", 403, "access is denied"),
    ):
        rule = proxy.fail(r"GET .*a\.png", kind, value, times=99)  # type: ignore[arg-type]
        with pytest.raises(DatasetError, match=message):
            source.read(item)
        rule.times = 0


def test_a_replaced_object_is_not_read(put: Put, opened: Open) -> None:
    put({"a.png": b"picture"})
    source = opened()
    (item,) = source.listing().pictures
    put({"a.png": b"another"})
    for length in (3, 100):
        with pytest.raises(DatasetError, match=r"a\.png failed: it was replaced or removed"):
            source.header(item, length)


def test_a_bucket_that_is_not_there(put: Put, proxy: FaultyProxy) -> None:
    with (
        closing(S3Source(settings(proxy.url, name="absent"))) as source,
        pytest.raises(DatasetError, match="no such bucket"),
    ):
        source.listing()
    with pytest.raises(DatasetError, match="check aws_endpoint_url"):
        S3Source(settings("no address"))


def test_without_credentials_requests_are_not_signed(put: Put, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    put({"a.png": b"picture"})
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    source = opened()
    assert source.read(source.listing().pictures[0]) == b"picture"


def test_captions_in_a_table_of_the_bucket(put: Put, proxy: FaultyProxy, tmp_path: Path) -> None:
    stream = io.BytesIO()
    pq.write_table(pa.table({"id": ["picture_0", "deep/picture_1"], "description": ["first", "second"]}), stream)
    put(make_folder(tmp_path / "set"))
    client = boto3.client("s3", endpoint_url=proxy.url, region_name="us-east-1")
    client.put_object(Bucket=BUCKET, Key="tables/captions.parquet", Body=stream.getvalue())
    client.close()

    def found(path: str) -> dict[str, tuple[str, ...] | None]:
        table = {"path": path}
        with closing(open_source(settings(proxy.url, metadata_table=table, caption_strategy="parquet"))) as source:
            return {item.name: item.captions for item in source.listing().pictures}

    assert found("tables/captions.parquet") == {
        "picture_0.png": ("first",), "deep/picture_1.png": ("second",), "picture_2.png": None,
        "deep/picture_3.png": None,
    }  # fmt: skip
    with pytest.raises(DatasetError, match=r"no such object \(404\); check parquet\.path"):
        found("tables/absent.parquet")
