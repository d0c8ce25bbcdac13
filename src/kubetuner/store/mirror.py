"""Shards of a bucket on this machine's disk: fetched when they are needed or a little earlier, removed when room is.

A shard is named by its checksum, so one folder may serve several buckets and any number of processes at once. All they
need to agree on is held by locks of the operating system, which vanish with their process:

* Who fetches a shard holds a lock on ``<sha256>.part``; others wait for the file to be renamed.
* Who has a shard mapped holds a shared lock on it; only what can be locked alone is removed, the least recently used
  first. A file's access time is its last use, its modification time says that its checksum was right.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

from kubetuner.digests import sha256_of
from kubetuner.environment import number_above_zero
from kubetuner.errors import ArtifactError
from kubetuner.store.files import DamagedError, Lease
from kubetuner.store.folder import WRONG_BYTES, date, is_dated

logger = logging.getLogger(__name__)

FETCHERS = 8
"""Downloads at once in the background."""
_POLL_SECONDS = 0.02


class Sink(Protocol):
    """What a shard's bytes are written to."""

    def restart(self) -> None:
        """Forget what was written: it comes again from the start."""

    def write(self, data: bytes, /) -> int:
        """Take the bytes that follow."""


class Mirror:
    """A folder of shards, at most ``bound`` bytes of them unless more are in use.

    Args:
        folder: Made on the first fetch.
        bound: Bytes.
        size: Bytes of a shard; raises :class:`DamagedError` for one that is missing.
        download: Writes a shard's bytes to a stream; called on several threads.
    """

    def __init__(
        self, folder: Path, bound: int, size: Callable[[str], int], download: Callable[[str, Sink], None]
    ) -> None:
        self.folder, self.bound = folder, bound
        self._size, self._download = size, download
        self._sound: set[str] = set()
        self._told = False
        self._wanted: deque[str] = deque()
        self._fetchers: list[threading.Thread] = []
        self._lock = threading.Lock()

    def path(self, file: str) -> Path:
        """Where the shard is, or would be."""
        return self.folder / file

    def lease(self, file: str) -> Lease:
        """The shard, fetched if it is not here, and kept here until it is released.

        Raises:
            DamagedError: It is missing from the bucket or damaged there.
            ArtifactError: It cannot be fetched or kept.
        """
        while True:
            self._fetch(file)
            lease = self._locked(file)
            if lease is None:
                continue
            if file in self._sound or self._is_sound(file):
                self._sound.add(file)
                date(lease.path, lease.path.stem)
                return lease
            lease.release()
            logger.warning("%s was damaged on this machine's disk and is fetched again", lease.path)
            lease.path.unlink(missing_ok=True)

    def fetch_ahead(self, files: Iterable[str]) -> None:
        """Fetch ``files`` in the background, in this order; what was asked for before and not begun is dropped."""
        with self._lock:
            self._wanted = deque(files)
            self._fetchers = [thread for thread in self._fetchers if thread.is_alive()]
            for _ in range(min(FETCHERS, len(self._wanted)) - len(self._fetchers)):
                # Daemons: a step that fails does not wait for shards that nobody reads.
                self._fetchers.append(threading.Thread(target=self._work, name="kubetuner-fetch", daemon=True))
                self._fetchers[-1].start()

    def _work(self) -> None:
        while (file := self._next()) is not None:
            try:
                if self.path(file).exists():
                    date(self.path(file), self.path(file).stem)  # Used soon: not the one to remove now.
                self._fetch(file, ahead=True)
            except (ArtifactError, DamagedError) as error:
                # Whoever needs the shard fetches it again and tells what is wrong.
                logger.info("fetching %s ahead failed: %s", file, error)

    def _next(self) -> str | None:
        with self._lock:
            if self._wanted:
                return self._wanted.popleft()
            self._fetchers.remove(threading.current_thread())
            return None

    def _is_sound(self, file: str) -> bool:
        """Whether a shard that an earlier process fetched still has its checksum."""
        path = self.path(file)
        return is_dated(path.stat(), path.stem) and sha256_of(path) == path.stem

    def _locked(self, file: str) -> Lease | None:
        """A lease of a shard that is here; ``None`` when it is not, or was removed at this very moment."""
        try:
            descriptor = os.open(self.path(file), os.O_RDONLY)
        except FileNotFoundError:
            return None
        lease = Lease(self.path(file), os.fstat(descriptor).st_size, lambda: os.close(descriptor))
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return lease if os.fstat(descriptor).st_nlink else None

    def _fetch(self, file: str, *, ahead: bool = False) -> None:
        """Fetch the shard unless it is here, or wait until another thread or process has.

        ``ahead`` of its use it is left where it is when those in use leave no room.
        """
        path = self.path(file)
        part = path.with_suffix(".part")
        while not path.exists():
            with _disk_errors_told(self.folder), _opened(part) as stream:
                if not _lock_alone(stream):
                    time.sleep(_POLL_SECONDS)
                elif not _is_at(part, stream):
                    continue  # Put in place or removed between opening and locking.
                elif path.exists():
                    part.unlink()
                elif not self._fill(file, part, stream, ahead):
                    return

    def _fill(self, file: str, part: Path, stream: IO[bytes], ahead: bool) -> bool:
        """Download a shard into ``stream``, hashing the bytes as they come, and put it in place; whether it was."""
        try:
            size = self._size(file)
            with _one_at_a_time(self.folder):
                stream.truncate(0)
                if not self._make_room(size, ahead) and ahead:
                    part.unlink()
                    return False
                # It takes its room from the start, so that others who make room count it.
                stream.truncate(size)
            hashing = _Hashing(stream)
            self._download(file, hashing)
            stream.flush()
            if stream.tell() != size or hashing.digest() != part.stem:
                raise DamagedError(WRONG_BYTES)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        date(part, part.stem)
        part.rename(self.path(file))
        self._sound.add(file)
        return True

    def _make_room(self, need: int, ahead: bool) -> bool:
        """Remove the least recently used shards that nobody has mapped; whether ``need`` more bytes fit then."""
        held = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                status = entry.stat()
                held.append((status.st_atime_ns, Path(entry.path), status.st_size))
        total = need + sum(size for _, _, size in held)
        for _, path, size in sorted(held):
            if total <= self.bound:
                break
            if _evict(path):
                total -= size
        if total > self.bound and not ahead and not self._told:
            self._told = True
            logger.warning(
                "%s holds %.3f GiB of shards that are in use, more than KUBETUNER_STORE_CACHE_GIB allows (%.3f)",
                self.folder, total / 2**30, self.bound / 2**30,
            )  # fmt: skip
        return total <= self.bound


class _Hashing:
    """A stream to write to that knows the SHA-256 of what went through."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.restart()

    def restart(self) -> None:
        self._stream.seek(0)
        self._hash = hashlib.sha256()

    def write(self, data: bytes, /) -> int:
        self._hash.update(data)
        return self._stream.write(data)

    def digest(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def _disk_errors_told(folder: Path) -> Iterator[None]:
    """Make ``folder``; what the disk refuses becomes a message."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ArtifactError(
            f"the shards cannot be kept in {folder}: {error}; choose another folder by KUBETUNER_STORE_CACHE, or less "
            "room by KUBETUNER_STORE_CACHE_GIB"
        ) from error


def _opened(part: Path) -> IO[bytes]:
    """Open for writing without emptying what another process may be filling."""
    return os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b")


def _is_at(path: Path, stream: IO[bytes]) -> bool:
    """Whether what was opened as ``path`` still has that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def configured() -> tuple[Path, int]:
    """The folder and bound of the mirror that the environment names.

    ``KUBETUNER_STORE_CACHE`` is the folder, by default one in the system's temporary folder.
    ``KUBETUNER_STORE_CACHE_GIB`` is the bound, by default half of what the disk has left for it.

    Raises:
        InputError: The bound is no number above 0.
    """
    named = os.environ.get("KUBETUNER_STORE_CACHE", "")
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"kubetuner-store-{os.getuid()}"
    given = number_above_zero(os.environ, "KUBETUNER_STORE_CACHE_GIB", "GiB as a number above 0, such as 50")
    if given is None:
        there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return folder, (shutil.disk_usage(there).free + held) // 2
    return folder, int(given * 2**30)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Among all threads and processes that do something with ``folder``."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock_alone(stream: IO[bytes]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _evict(path: Path) -> bool:
    """Remove a file that nobody holds a lock on; whether it is gone."""
    try:
        with path.open("rb") as stream:
            if not _lock_alone(stream):
                return False
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    return True
