"""A bucket on a real emulator process, behind a proxy that misbehaves."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from PIL import Image

from kubetuner import google_storage
from kubetuner.artifacts import Sample, read_rows
from kubetuner.config.sections.sources import DatasetSource, DownloadSection
from kubetuner.errors import DatasetError
from kubetuner.sources import base, gcs
from kubetuner.sources.base import Listing
from kubetuner.sources.gcs import GcsSource
from kubetuner.sources.switch import open_source
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from tests.servers.faults import FaultyProxy
from tests.servers.gcs import empty_bucket, fake_gcs, let_go
from tests.servers.metadata import TOKEN, metadata_server

BUCKET = "pictures-bucket"


@pytest.fixture(scope="module")
def emulator() -> Iterator[str]:
    with fake_gcs() as host:
        yield host


@pytest.fixture
def proxy(emulator: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with FaultyProxy(emulator) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        monkeypatch.setattr(google_storage, "RETRY_SECONDS", 20.0)
        monkeypatch.setattr(base, "LONGEST_PAUSE_SECONDS", 0.01)
        yield proxy


@pytest.fixture
def bucket(emulator: str) -> Iterator[storage.Bucket]:
    """An empty bucket, reached past the proxy."""
    with empty_bucket(emulator, BUCKET) as bucket:
        yield bucket


def make_folder(root: Path) -> dict[str, bytes]:
    """A folder with six pictures, captions, and what has to be left out; its files by name."""
    for index in range(6):
        path = root / ("deep/er" if index % 2 else ".") / f"a_picture_{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((400, 320), 40 + index).convert("RGB").save(path)
        path.with_suffix(".txt").write_text(f"picture {index}\nünother")
    (root / "notes.md").write_text("no picture")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(b"x")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def upload(bucket: storage.Bucket, files: dict[str, bytes], prefix: str = "set/one/") -> None:
    for name, content in files.items():
        bucket.blob(prefix + name).upload_from_string(content)


def settings(address: str = f"gs://{BUCKET}/set/one", **more: Any) -> DatasetSource:
    kind = "gcs" if address.startswith("gs://") else "local"
    return DatasetSource.model_validate({"id": "set", "type": kind, "instance_data_dir": address, **more})


Open = Callable[..., GcsSource]
# Google's client leaves the connection of a refused request to the garbage collector, whenever that comes.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture
def opened(proxy: FaultyProxy) -> Iterator[Open]:
    """Opens sources behind the proxy and closes them in the end."""
    with ExitStack() as stack:
        yield lambda **more: stack.enter_context(closing(GcsSource(settings(**more))))
    let_go()


def test_pages_are_listed_and_a_prefix_is_a_folder(
    opened: Open, bucket: storage.Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(bucket, {f"{index}.png": b"x" for index in range(7)} | {"a.txt": b"a", ".x/a.png": b"", "n.md": b""})
    upload(bucket, {"other.png": b"x"}, prefix="set/one-more/")
    monkeypatch.setattr(google_storage, "PAGE_SIZE", 3)
    listing = opened().listing()
    assert [item.name for item in listing.pictures] == [f"{index}.png" for index in range(7)]
    assert list(listing.texts) == ["a.txt"]
    assert listing.newest > 0
    assert sum("/o?" in line for line in proxy.requests) >= 3
    assert opened(address=f"gs://{BUCKET}/set/one/").listing().revision == listing.revision
    assert len(opened(address=f"gs://{BUCKET}").listing().pictures) == 8
    upload(bucket, {"0.png": b"x"})
    assert opened().listing().revision != listing.revision


def test_the_same_data_is_the_same_dataset(bucket: storage.Bucket, proxy: FaultyProxy, tmp_path: Path) -> None:
    upload(bucket, make_folder(tmp_path / "set"))
    prints = []
    for number, address in enumerate((str(tmp_path / "set"), f"gs://{BUCKET}/set/one")):
        section = DownloadSection(datasets=(settings(address, caption_strategy="textfile"),))
        prints.append(download_dataset(section, tmp_path / str(number)).fingerprint)
    assert prints[0] == prints[1]
    rows = list(read_rows(tmp_path / "1", "samples.jsonl", Sample))
    assert rows[0].captions == ("picture 0", "ünother")


def test_plan_reads_beginnings_only(
    bucket: storage.Bucket, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(bucket, make_folder(tmp_path / "set"))
    config = {"model_type": "full", "model_family": "pixart_sigma", "train_batch_size": 2, "max_train_steps": 10}
    data = {"id": "set", "type": "gcs", "instance_data_dir": f"gs://{BUCKET}/set/one", "resolution": 128}
    plan = make_plan(config, [data], cwd=tmp_path)
    assert plan.summary["samples"] == {"set": 6}
    assert set(proxy.ranges) == {"bytes=0-65535"}
    (source,) = plan.sections.download.datasets
    assert (source.instance_data_dir, len(source.revision)) == (data["instance_data_dir"], 64)
    upload(bucket, {"late.png": b"x"})
    assert download_dataset(plan.sections.download, tmp_path / "out").num_samples == 6
    upload(bucket, {"a_picture_2.png": b"x"})
    with pytest.raises(DatasetError, match=r"written since: a_picture_2\.png"):
        download_dataset(plan.sections.download, tmp_path / "out")
    missing = data | {"instance_data_dir": "gs://absent-bucket/x"}
    with pytest.raises(Exception, match=r"\[0\].instance_data_dir: listing gs://absent-bucket/x .* no such bucket"):
        make_plan(config, [missing], cwd=tmp_path)


@pytest.mark.parametrize("fault", [("status", 503), ("status", 429), ("cut", 100), ("reset", 0), ("corrupt", 0)])
def test_passing_faults_are_outlived(
    opened: Open, bucket: storage.Bucket, proxy: FaultyProxy, fault: tuple[Any, int]
) -> None:
    content = os.urandom(4000)
    upload(bucket, {"a.png": content})
    listing_faults = {"status", "reset"}
    if fault[0] in listing_faults:
        proxy.fail(r"GET .*/o\?", *fault)
    proxy.fail(r"GET .*a\.png", *fault)
    source = opened()
    (item,) = source.listing().pictures
    assert source.read(item) == content
    assert all(rule.times == 0 for rule in proxy.faults)


def test_lasting_faults_are_told(
    opened: Open, bucket: storage.Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(bucket, {"a.png": b"picture"})
    source = opened()
    (item,) = source.listing().pictures
    rule = proxy.fail(r"GET .*a\.png", "corrupt", times=99)
    with pytest.raises(DatasetError, match=r"reading gs://.*/set/one/a\.png failed 5 times.*"):
        source.read(item)
    rule.times = 0
    monkeypatch.setattr(google_storage, "RETRY_SECONDS", 1.0)
    rule = proxy.fail(r"GET .*a\.png", "status", 503, times=99)
    with pytest.raises(DatasetError, match="try again later"):
        source.read(item)
    rule.times = 0
    proxy.fail(r"GET .*a\.png", "status", 403)
    with pytest.raises(DatasetError, match="Storage Object Viewer"):
        source.read(item)
    assert source.read(item) == b"picture"


def test_a_replaced_object_is_not_read(opened: Open, bucket: storage.Bucket, proxy: FaultyProxy) -> None:
    upload(bucket, {"a.png": b"picture"})
    source = opened()
    (item,) = source.listing().pictures
    upload(bucket, {"a.png": b"another"})
    for call in (lambda: source.read(item), lambda: source.header(item, 3)):
        with pytest.raises(DatasetError, match=r"a\.png failed: it was replaced or removed"):
            call()


def test_large_objects_come_in_parts(
    opened: Open, bucket: storage.Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(70_000)
    upload(bucket, {"a.png": content})
    monkeypatch.setattr(gcs, "CHUNK_BYTES", 30_000)
    source = opened()
    (item,) = source.listing().pictures
    proxy.fail(r"GET .*a\.png.*alt=media", "status", 503)
    proxy.fail(r"GET .*a\.png.*alt=media", "corrupt")
    assert source.read(item) == content
    assert all(rule.times == 0 for rule in proxy.faults)
    assert {"bytes=0-29999", "bytes=30000-59999"} <= set(proxy.ranges)


def test_a_malformed_address_is_named() -> None:
    with pytest.raises(DatasetError, match="no address like gs://bucket/prefix"):
        GcsSource(settings("gs:///x"))


@pytest.fixture
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")


@pytest.mark.usefixtures("no_credentials")
def test_without_credentials_requests_are_anonymous(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), closing(GcsSource(settings())) as source:
        assert isinstance(source._client._credentials, AnonymousCredentials)
    assert "requests are anonymous" in caplog.text


POD = """
from google.auth.transport.requests import Request
from kubetuner.errors import DatasetError
from kubetuner.google_storage import connect

for access in ("read_only", "read_write"):
    client = connect(access, 1, DatasetError)
    client._credentials.refresh(Request())
    print(client._credentials.token)
"""


@pytest.mark.usefixtures("no_credentials")
def test_a_pod_has_the_tokens_of_its_service_account(tmp_path: Path) -> None:
    """Workload identity: Google's library asks the metadata server, whose address it reads when it is imported."""
    with metadata_server() as (host, asked):
        added = {"GCE_METADATA_HOST": host, "GCE_METADATA_IP": host, "CLOUDSDK_CONFIG": str(tmp_path)}
        environment = {name: value for name, value in os.environ.items() if name != "NO_GCE_CHECK"} | added
        done = subprocess.run([sys.executable, "-c", POD], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [TOKEN, TOKEN], done.stderr
    scopes = [path.rpartition("devstorage.")[2] for path in asked if "/token?" in path]
    assert scopes == ["read_only", "read_write"]


@pytest.mark.usefixtures("no_credentials")
def test_credentials_that_cannot_be_used_are_no_reason_to_go_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    with pytest.raises(DatasetError, match=r"GOOGLE_APPLICATION_CREDENTIALS is .*key\.json.*not found"):
        GcsSource(settings())
    (tmp_path / "key.json").write_text("{}")
    with pytest.raises(DatasetError, match="cannot be used"):
        GcsSource(settings())


def test_a_replaced_object_stops_the_step(
    bucket: storage.Bucket, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(bucket, make_folder(tmp_path / "set"))

    class Replacing(GcsSource):
        """Somebody writes to the bucket right after it was listed."""

        def listing(self) -> base.Listing:
            found = super().listing()
            upload(bucket, {"a_picture_2.png": b"other"})
            return found

    monkeypatch.setattr(gcs, "GcsSource", Replacing)
    with pytest.raises(DatasetError, match=r"gs://.*/a_picture_2\.png failed: it was replaced or removed while"):
        download_dataset(DownloadSection(datasets=(settings(),)), tmp_path / "out")
    assert not (tmp_path / "out" / "artifact.json").exists()


def test_captions_in_a_table_of_the_bucket(bucket: storage.Bucket, proxy: FaultyProxy, tmp_path: Path) -> None:
    upload(bucket, make_folder(tmp_path / "set"))
    names = [f"{'deep/er/' if index % 2 else ''}a_picture_{index}" for index in range(5)]
    pq.write_table(pa.table({"id": names, "description": list("abcde")}), tmp_path / "captions.parquet")
    bucket.blob("tables/captions.parquet").upload_from_filename(str(tmp_path / "captions.parquet"))

    def listed(path: str) -> Listing:
        with closing(open_source(settings(metadata_table={"path": path}, caption_strategy="parquet"))) as source:
            return source.listing()

    for path in ("tables/captions.parquet", f"gs://{BUCKET}/tables/captions.parquet"):
        found = {item.name: item.captions for item in listed(path).pictures}
        assert found["a_picture_0.png"] == ("a",)
        assert found["deep/er/a_picture_3.png"] == ("d",)
        assert found["deep/er/a_picture_5.png"] is None
    before = listed("tables/captions.parquet").revision
    bucket.blob("tables/captions.parquet").upload_from_filename(str(tmp_path / "captions.parquet"))
    assert listed("tables/captions.parquet").revision != before
    with pytest.raises(DatasetError, match=rf"there is no gs://{BUCKET}/tables/absent\.parquet; check parquet\.path"):
        listed("tables/absent.parquet")
