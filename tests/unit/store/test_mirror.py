"""Shards on this machine's disk, within a bound."""

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from kubetuner.errors import ArtifactError
from kubetuner.store import mirror as mirror_module
from kubetuner.store.files import DamagedError
from kubetuner.store.mirror import Mirror, Sink, configured
from tests.unit.conftest import fetchers_end, fork, wait

SHARDS = [bytes([number]) * 1000 for number in range(6)]
FILES = [f"{hashlib.sha256(data).hexdigest()}.safetensors" for data in SHARDS]


class Elsewhere:
    """Where the shards come from, and what was fetched."""

    def __init__(self) -> None:
        self.content = dict(zip(FILES, SHARDS, strict=True))
        self.fetched: list[int] = []
        self.before: Callable[[], None] = lambda: None

    def size(self, file: str) -> int:
        if file not in self.content:
            raise DamagedError("is missing")
        return len(self.content[file])

    def download(self, file: str, sink: Sink) -> None:
        self.fetched.append(FILES.index(file))
        self.before()
        sink.restart()
        sink.write(self.content[file][:1])
        sink.restart()  # A first try that was cut.
        sink.write(self.content[file])


@pytest.fixture
def elsewhere() -> Elsewhere:
    return Elsewhere()


@pytest.fixture
def mirror(elsewhere: Elsewhere, tmp_path: Path) -> Mirror:
    """Room for three shards."""
    return Mirror(tmp_path / "mirror", 3500, elsewhere.size, elsewhere.download)


def held(mirror: Mirror) -> set[int]:
    return {FILES.index(path.name) for path in mirror.folder.iterdir()}


def use(mirror: Mirror, number: int) -> None:
    lease = mirror.lease(FILES[number])
    assert (lease.path.read_bytes(), lease.size) == (SHARDS[number], 1000)
    lease.release()
    time.sleep(0.002)


def test_the_least_recently_used_goes_first(mirror: Mirror, elsewhere: Elsewhere) -> None:
    for number in (0, 1, 2, 0, 3):
        use(mirror, number)
    assert held(mirror) == {0, 2, 3}
    for number in (2, 4, 0):
        use(mirror, number)
    assert held(mirror) == {0, 2, 4}
    assert elsewhere.fetched == [0, 1, 2, 3, 4, 0]


def test_what_is_leased_stays(mirror: Mirror, elsewhere: Elsewhere, caplog: pytest.LogCaptureFixture) -> None:
    leases = [mirror.lease(FILES[number]) for number in (0, 1)]
    for number in (2, 3, 4):
        use(mirror, number)
    assert held(mirror) == {0, 1, 4}
    assert not caplog.messages
    leases += [mirror.lease(FILES[number]) for number in (4, 5)]
    assert held(mirror) == {0, 1, 4, 5}
    assert "of shards that are in use, more than KUBETUNER_STORE_CACHE_GIB allows" in caplog.text
    for lease in leases:
        lease.release()
    use(mirror, 2)
    assert held(mirror) == {2, 4, 5}


def test_what_another_process_has_leased_stays_until_it_ends(mirror: Mirror, elsewhere: Elsewhere) -> None:
    use(mirror, 0)
    ready, told = os.pipe()

    def hold() -> None:
        lease = Mirror(mirror.folder, 3500, elsewhere.size, elsewhere.download).lease(FILES[0])
        os.write(told, b"x")
        time.sleep(60)
        lease.release()

    child = fork(hold)
    os.read(ready, 1)
    for number in (1, 2, 3, 4):
        use(mirror, number)
    assert held(mirror) == {0, 3, 4}
    os.kill(child, signal.SIGKILL)
    assert wait(child) == -signal.SIGKILL
    use(mirror, 5)
    assert held(mirror) == {3, 4, 5}


def test_a_fetch_that_was_killed_is_made_again(mirror: Mirror, elsewhere: Elsewhere) -> None:
    elsewhere.before = lambda: os._exit(9)
    assert wait(fork(lambda: mirror.lease(FILES[0]))) == 9
    assert [path.suffix for path in mirror.folder.iterdir()] == [".part"]
    elsewhere.before = lambda: None
    use(mirror, 0)
    assert held(mirror) == {0}


def test_threads_and_mirrors_share_one_fetch(mirror: Mirror, elsewhere: Elsewhere) -> None:
    elsewhere.before = lambda: time.sleep(0.1)
    other = Mirror(mirror.folder, 3500, elsewhere.size, elsewhere.download)
    threads = [threading.Thread(target=use, args=(one, 0)) for one in (mirror, other, mirror, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert elsewhere.fetched == [0]
    assert held(mirror) == {0}


def test_a_fetch_that_ends_between_opening_and_locking_is_taken(
    mirror: Mirror, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Mirror(mirror.folder, 3500, elsewhere.size, elsewhere.download)
    lock = mirror_module._lock_alone

    def other_was_faster(stream: IO[bytes]) -> bool:
        monkeypatch.setattr(mirror_module, "_lock_alone", lock)
        use(other, 0)
        return lock(stream)

    monkeypatch.setattr(mirror_module, "_lock_alone", other_was_faster)
    use(mirror, 0)

    assert elsewhere.fetched == [0]
    assert held(mirror) == {0}


def test_damage_here_is_mended_and_damage_there_is_told(
    mirror: Mirror, elsewhere: Elsewhere, caplog: pytest.LogCaptureFixture
) -> None:
    use(mirror, 0)
    before = mirror.path(FILES[0]).stat()
    mirror.path(FILES[0]).write_bytes(b"x" * 1000)
    os.utime(mirror.path(FILES[0]), ns=(before.st_atime_ns, before.st_mtime_ns))
    later = Mirror(mirror.folder, 3500, elsewhere.size, elsewhere.download)
    use(later, 0)
    assert "was damaged on this machine's disk and is fetched again" in caplog.text
    assert elsewhere.fetched == [0, 0]
    for data in (b"x" * 1000, b"x"):
        elsewhere.content[FILES[1]] = data
        with pytest.raises(DamagedError, match="do not have the checksum"):
            later.lease(FILES[1])
    del elsewhere.content[FILES[1]]
    with pytest.raises(DamagedError, match="is missing"):
        later.lease(FILES[1])
    assert held(mirror) == {0}


def test_shards_are_fetched_ahead_in_order(
    mirror: Mirror, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kubetuner.store.mirror.FETCHERS", 1)  # Several begin in order, and may overtake each other.
    use(mirror, 5)
    mirror.fetch_ahead([FILES[5], FILES[2], "missing", FILES[0]])
    fetchers_end()
    assert held(mirror) == {0, 2, 5}
    assert elsewhere.fetched == [5, 2, 0]
    use(mirror, 2)
    assert elsewhere.fetched == [5, 2, 0]


def test_a_shard_that_is_needed_now_does_not_wait_for_those_ahead(mirror: Mirror, elsewhere: Elsewhere) -> None:
    gate = threading.Event()
    elsewhere.before = lambda: threading.current_thread().name == "kubetuner-fetch" and gate.wait(10)  # type: ignore[assignment]
    mirror.fetch_ahead(FILES[:2])
    use(mirror, 3)
    mirror.fetch_ahead([])
    gate.set()


def test_what_is_fetched_ahead_stays_within_the_bound(
    mirror: Mirror, elsewhere: Elsewhere, caplog: pytest.LogCaptureFixture
) -> None:
    leases = [mirror.lease(FILES[number]) for number in (0, 1, 2)]
    mirror.fetch_ahead([FILES[3]])
    fetchers_end()
    assert held(mirror) == {0, 1, 2}
    assert elsewhere.fetched == [0, 1, 2]
    assert not caplog.messages
    leases.pop().release()
    mirror.fetch_ahead([FILES[3]])
    fetchers_end()
    assert held(mirror) == {0, 1, 3}
    for lease in leases:
        lease.release()


def test_a_folder_that_cannot_be_written_is_named(elsewhere: Elsewhere, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mirror = Mirror(tmp_path / "file", 3500, elsewhere.size, elsewhere.download)
    with pytest.raises(
        ArtifactError, match=r"cannot be kept in .*file: .*; choose another folder by KUBETUNER_STORE_CACHE"
    ):
        mirror.lease(FILES[0])


def test_by_default_half_of_the_free_disk_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("KUBETUNER_STORE_CACHE", raising=False)
    monkeypatch.delenv("KUBETUNER_STORE_CACHE_GIB", raising=False)
    folder, bound = configured()
    assert folder.name == f"kubetuner-store-{os.getuid()}"
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert 0.3 * free < bound < 0.7 * free
    monkeypatch.setenv("KUBETUNER_STORE_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("KUBETUNER_STORE_CACHE_GIB", "0.5")
    assert configured() == (tmp_path / "here", 1 << 29)
