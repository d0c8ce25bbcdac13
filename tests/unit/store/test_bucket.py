"""The store's promises, kept in a bucket."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kubetuner.artifacts import ShardEntry
from kubetuner.data.shards import ShardReader
from kubetuner.errors import ArtifactError, InputError
from kubetuner.store import Store, open_store
from kubetuner.storekeeping import DAY, damaged, find_garbage, namespaces, remove
from tests.servers.faults import FaultyProxy
from tests.unit.conftest import fork, wait

# Google's client leaves the connection of a refused request to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

ADDRESS = "gs://store-bucket/team/store"
PREFIX = "team/store"


def samples(*numbers: int, size: int = 64) -> dict[str, dict[str, torch.Tensor]]:
    return {
        f"k{number}": {"x": torch.randn(size, generator=torch.Generator().manual_seed(number))} for number in numbers
    }


def read(store: Store, shard: ShardEntry, *numbers: int, size: int = 64) -> None:
    """Read samples back and compare."""
    reader = ShardReader(store)
    for number in numbers:
        assert torch.equal(
            reader.tensors(f"k{number}", shard.file, ["x"])["x"], samples(number, size=size)[f"k{number}"]["x"]
        )


def content(bucket: Any) -> dict[str, bytes]:
    return {blob.name: blob.download_as_bytes() for blob in bucket.list_blobs()}


def test_the_bucket_holds_what_a_folder_would(proxy: FaultyProxy, bucket: Any, tmp_path: Path) -> None:
    folder, store = Store(tmp_path / "folder"), open_store(f"{ADDRESS}/")
    for each in (folder, store):
        shards = [each.write_shard("space", samples(1, 2)), each.write_shard("other", samples(3))]
        assert each.known("space") == {"k1": shards[0], "k2": shards[0]}
        assert each.known("space", {"k2", "k9"}) == {"k2": shards[0]}
        assert each.known("other") == {"k3": shards[1]}
        assert each.known("none") == {}
        assert each.shapes(shards) == {"x": (64,)}
        each.verify(*shards)
        read(each, shards[0], 2, 1)
    assert store.place == ADDRESS
    files = (path for path in (tmp_path / "folder").rglob("*") if path.is_file())
    assert content(bucket) == {
        f"{PREFIX}/{path.relative_to(tmp_path / 'folder').as_posix()}": path.read_bytes() for path in files
    }
    assert [path.name for path in (tmp_path / "mirror").iterdir()] == [shards[0].file]


@pytest.mark.parametrize("fault", [("status", 503), ("status", 429), ("reset", 0), ("cut", 40), ("corrupt", 0)])
def test_passing_faults_are_outlived(proxy: FaultyProxy, bucket: Any, fault: tuple[Any, int]) -> None:
    uploads = [] if fault[0] in ("cut", "corrupt") else [proxy.fail(r"POST .*uploadType", *fault, times=2)]
    store = open_store(ADDRESS)
    shard = store.write_shard("space", samples(1, size=4000))
    faults = [*uploads, proxy.fail(r"GET .*safetensors.*alt=media", *fault)]
    if fault[0] in ("status", "reset"):
        faults += [proxy.fail(r"GET .*/o\?", *fault), proxy.fail(r"GET .*json.*alt=media", *fault)]
    assert open_store(ADDRESS).known("space") == {"k1": shard}
    read(open_store(ADDRESS), shard, 1, size=4000)
    assert all(rule.times == 0 for rule in faults)


def test_a_large_shard_is_uploaded_in_spite_of_faults(proxy: FaultyProxy, bucket: Any) -> None:
    faults = [proxy.fail(r"PUT .*upload_id", "status", status) for status in (503, 410)]
    store = open_store(ADDRESS)
    shard = store.write_shard("space", samples(1, size=3 << 20))  # Above 8 MiB uploads are resumable.
    assert sum(line.startswith("POST") and "uploadType=resumable" in line for line in proxy.requests) == 2
    assert all(rule.times == 0 for rule in faults)
    read(store, shard, 1, size=3 << 20)


def test_what_lasts_is_told(proxy: FaultyProxy, bucket: Any) -> None:
    store = open_store(ADDRESS)
    shard = store.write_shard("space", samples(1))
    rule = proxy.fail(r"POST .*uploadType", "status", 403, times=99)
    with pytest.raises(
        ArtifactError, match=r"writing gs://.*\.safetensors failed: access is denied \(403\); .*Object User"
    ):
        store.write_shard("space", samples(2))
    rule.times = 0
    proxy.fail(r"GET .*safetensors.*alt=media", "status", 403)
    with pytest.raises(ArtifactError, match=rf"reading .*{shard.file} failed: access is denied"):
        store.lease(shard.file)
    with pytest.raises(
        ArtifactError, match=r"listing gs://absent/x/index/space failed: there is no such bucket \(404\)"
    ):
        open_store("gs://absent/x").known("space")
    with pytest.raises(ArtifactError, match="no address like gs://bucket/prefix; check KUBETUNER_STORE"):
        open_store("gs:///x")


@pytest.mark.parametrize("bound", ["0", "-1", "many", "inf", "nan"])
def test_a_bound_is_a_number(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setenv("KUBETUNER_STORE_CACHE_GIB", bound)
    with pytest.raises(InputError, match=rf"KUBETUNER_STORE_CACHE_GIB is '{bound}'; expected"):
        open_store(ADDRESS)


def replace(bucket: Any, shard: ShardEntry, data: bytes | None) -> None:
    """Somebody removes or overwrites a shard."""
    blob = bucket.blob(f"{PREFIX}/shards/{shard.file}")
    old = blob.download_as_bytes()
    blob.delete()
    if data is not None:
        blob.upload_from_string(data or old[:-1] + bytes([old[-1] ^ 1]))


@pytest.mark.parametrize(
    ("data", "words"), [(b"", "do not have the checksum"), (b"cut", "it has 3 bytes, expected"), (None, "is missing")]
)
def test_a_damaged_object_is_named_and_replaced(
    proxy: FaultyProxy, bucket: Any, caplog: pytest.LogCaptureFixture, data: bytes | None, words: str
) -> None:
    store = open_store(ADDRESS)
    broken, whole = store.write_shard("space", samples(1, 2)), store.write_shard("space", samples(3))
    before = content(bucket)
    replace(bucket, broken, data)
    with pytest.raises(ArtifactError, match=words) as error:
        open_store(ADDRESS).verify(broken, whole)
    assert f"{ADDRESS}/shards/{broken.file}" in str(error.value)
    assert open_store(ADDRESS).known("space") == {"k3": whole}
    assert f"{broken.file} {'is missing' if data is None else 'is damaged'}" in caplog.text
    assert "its 2 samples are encoded again" in caplog.text
    assert store.write_shard("space", samples(1, 2)) == broken
    assert content(bucket) == before
    assert set(open_store(ADDRESS).known("space")) == {"k1", "k2", "k3"}
    read(open_store(ADDRESS), broken, 1, 2)


def test_rot_behind_the_mark_is_found_when_the_shard_is_read(proxy: FaultyProxy, bucket: Any) -> None:
    shard = open_store(ADDRESS).write_shard("space", samples(1))
    replace(bucket, shard, b"")
    blob = bucket.blob(f"{PREFIX}/shards/{shard.file}")
    blob.metadata = {"sha256": shard.sha256}
    blob.patch()
    store = open_store(ADDRESS)
    assert set(store.known("space")) == {"k1"}
    with pytest.raises(ArtifactError, match=f"{shard.file} is damaged .*; run the step that caches it again"):
        read(store, shard, 1)
    assert open_store(ADDRESS).known("space") == {}


def test_verify_reads_every_object(proxy: FaultyProxy, bucket: Any) -> None:
    store = open_store(ADDRESS)
    broken, _ = store.write_shard("space", samples(1, 2)), store.write_shard("space", samples(3))
    assert list(damaged(open_store(ADDRESS))) == []
    replace(bucket, broken, b"")
    assert list(damaged(open_store(ADDRESS))) == [(f"{ADDRESS}/shards/{broken.file}", 2)]
    assert list(damaged(open_store(ADDRESS))) == []


def test_objects_copied_by_other_means_are_hashed_once(proxy: FaultyProxy, bucket: Any) -> None:
    shard = open_store(ADDRESS).write_shard("space", samples(1))
    name = f"{PREFIX}/shards/{shard.file}"
    data = bucket.blob(name).download_as_bytes()
    bucket.blob(name).delete()
    bucket.blob(name).upload_from_string(data)
    for times in (1, 1):
        assert open_store(ADDRESS).known("space") == {"k1": shard}
        assert sum("GET" in line and "safetensors" in line and "alt=media" in line for line in proxy.requests) == times


def test_two_writers_may_race(proxy: FaultyProxy, bucket: Any) -> None:
    def write(numbers: range) -> None:
        store = open_store(ADDRESS)
        for number in numbers:
            store.write_shard("space", samples(number, number + 1))

    children = [fork(lambda: write(range(6))), fork(lambda: write(range(6))), fork(lambda: write(range(5, -1, -1)))]
    assert [wait(child) for child in children] == [0, 0, 0]
    store = open_store(ADDRESS)
    known = store.known("space")
    assert set(known) == {f"k{number}" for number in range(7)}
    assert len(content(bucket)) == 12
    for number in range(7):
        read(store, known[f"k{number}"], number)


def test_a_writer_killed_at_any_moment_leaves_nothing_half_written(proxy: FaultyProxy, bucket: Any) -> None:
    def complete() -> None:
        store = open_store(ADDRESS)
        known = store.known("space")
        for number in range(8):
            if f"k{number}" not in known:
                store.write_shard("space", samples(number, size=3 << 19))

    started = time.monotonic()
    for moment in (0.3, 0.5, 0.8):
        child = fork(complete)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store = open_store(ADDRESS)
        for key, shard in store.known("space").items():
            read(store, shard, int(key[1:]), size=3 << 19)
    complete()
    assert set(open_store(ADDRESS).known("space")) == {f"k{number}" for number in range(8)}
    assert sum(name.endswith(".safetensors") for name in content(bucket)) == 8
    assert time.monotonic() - started < 60


def test_gc_goes_by_claims(proxy: FaultyProxy, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import kubetuner.store as module

    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)
    store = open_store(ADDRESS)
    claimed, old, artifact = (store.write_shard("space", samples(number)) for number in (1, 2, 3))
    bucket.blob(f"{PREFIX}/shards/.left").upload_from_string(b"half")
    time.sleep(0.3)
    between = time.time() + 20 * DAY - 0.15
    assert open_store(ADDRESS).known("space", {"k1"}) == {"k1": claimed}
    (space,) = namespaces(store, time.time())
    assert (space.name, space.shards, space.samples) == ("space", 3, 3)
    assert space.unused_seconds < 60
    assert find_garbage(store, set(), 14, time.time()) == []
    found = find_garbage(store, {artifact.file}, 20, between)
    assert {one.file.file for one in found} == {".left", old.file}
    assert remove(store, found, 1e-9) == found
    assert set(open_store(ADDRESS).known("space")) == {"k1", "k3"}
    assert len(content(bucket)) == 4


def test_what_a_run_claims_while_gc_works_stays(
    proxy: FaultyProxy, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kubetuner.store as module

    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)
    store = open_store(ADDRESS)
    shard = store.write_shard("space", samples(1))
    found = find_garbage(store, set(), 20, time.time() + 21 * DAY)
    assert [one.file.file for one in found] == [shard.file]
    time.sleep(0.2)
    since = time.time()
    open_store(ADDRESS).claim([shard])
    assert remove(store, found, (time.time() - since) / DAY) == []
    assert set(open_store(ADDRESS).known("space")) == {"k1"}


def test_nothing_is_removed_that_changed_since_it_was_listed(
    proxy: FaultyProxy, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim or another writer comes between gc's last look and its removal: the removal's condition fails."""
    import kubetuner.store as module

    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)
    proxy.metagenerations = {}
    store, gc = open_store(ADDRESS), open_store(ADDRESS)
    shard = store.write_shard("space", samples(1))
    (entry,), (listed,) = gc.entries(), gc.files.listing("shards")
    store.claim([shard])
    gc.files.remove(entry)
    store.write_shard("space", samples(1))  # Finds the shard there and marks it.
    assert not gc.files.remove_unclaimed(listed, [], 0.0)
    assert set(store.known("space")) == {"k1"}
    for file in (*gc.entries(), *gc.files.listing("shards")):
        gc.files.remove(file)
    assert content(bucket) == {}


def test_fresh_claims_are_not_made_again(proxy: FaultyProxy, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = open_store(ADDRESS).write_shard("space", samples(1))
    store = open_store(ADDRESS)
    store.claim([shard])
    assert not any(line.startswith("PATCH") for line in proxy.requests)
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    store.renew_claims()
    assert sum(line.startswith("PATCH") for line in proxy.requests) == 1


def test_a_store_for_reading_only_is_read(
    proxy: FaultyProxy, bucket: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import kubetuner.store as module

    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)
    shard = open_store(ADDRESS).write_shard("space", samples(1))
    proxy.fail("^(PATCH|POST|PUT|DELETE)", "status", 403, times=99)
    store = open_store(ADDRESS)
    store.claim([shard])
    store.verify(shard)
    read(store, shard, 1)
    assert caplog.text.count("can only be read") == 1


def test_threads_that_want_one_shard_fetch_it_once(proxy: FaultyProxy, bucket: Any) -> None:
    shard = open_store(ADDRESS).write_shard("space", samples(1, size=100_000))
    stores = [open_store(ADDRESS) for _ in range(4)]
    threads = [threading.Thread(target=read, args=(store, shard, 1), kwargs={"size": 100_000}) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("safetensors" in line and "alt=media" in line for line in proxy.requests) == 1
