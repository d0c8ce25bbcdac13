"""What a step logged, on disk until MLflow has it."""

import contextlib
import fcntl
import io
import logging
import threading
import time
import uuid
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field

from kubetuner.artifacts import Record

logger = logging.getLogger(__name__)

BATCH = 1000
"""Metrics that MLflow takes in one call."""


def _encodable(text: str) -> str:
    """``text`` without lone surrogates, which file names that are not UTF-8 hold and JSON cannot."""
    return text.encode(errors="replace").decode()


Text = Annotated[str, BeforeValidator(_encodable)]


class Entry(Record):
    """One line of a journal; which fields mean something depends on ``kind``.

    Attributes:
        kind: ``start`` creates the run and ``end`` terminates it; ``finish`` terminates a group's parent run;
            ``sent`` says that the run ``text`` has the first ``step`` entries.
        key: Step, metric key, image key or artifact path.
        text: Group (``start``, ``finish``), run id (``sent``), text or picture's file.
        note: Name of the group's parent run (``start``, ``finish``), what went wrong (``end``).
        status: How the run ended (``end``, ``finish``).
        time: Milliseconds since 1970.
    """

    kind: Literal["start", "params", "metric", "image", "text", "end", "finish", "sent"]
    key: Text = ""
    text: Text = ""
    note: Text = ""
    status: str = ""
    value: float = 0.0
    step: int = 0
    time: int = 0
    params: dict[Text, Text] = Field(default_factory=dict)


class Journal:
    """The entries of one run: all on disk, those that MLflow does not have yet in memory; locked by its writer.

    Attributes:
        name: Tells it from every other journal.
        run_id: The MLflow run, empty until it is created.
    """

    def __init__(self, path: Path, stream: io.FileIO) -> None:
        self.path, self.name, self._stream = path, path.stem, stream
        self._lock, self._writable = threading.Lock(), True
        content = stream.readall()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # its writer was killed in the middle of a line
            stream.truncate(len(whole))
            stream.seek(len(whole))
        self._pending: list[Entry] = []
        self._sent, self.run_id = 0, ""
        for line in whole.splitlines():
            entry = Entry.model_validate_json(line)
            if entry.kind == "sent":
                self._sent, self.run_id = entry.step, entry.text
            else:
                self._pending.append(entry)
        kinds = {entry.kind for entry in self._pending}
        self.unended = "start" in kinds and "end" not in kinds
        self.last_time = max((entry.time for entry in self._pending), default=0)
        del self._pending[: self._sent]

    @classmethod
    def create(cls, folder: Path) -> Self:
        """A new journal in ``folder``; it gets its name when it is locked, so that nobody else adopts it."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.time_ns()}-{uuid.uuid4().hex}.jsonl"
        temporary = path.with_suffix(".tmp")
        stream = io.FileIO(temporary, "x+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.rename(path)
            return cls(path, stream)
        except OSError:
            stream.close()
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def adopt(cls, path: Path) -> Self | None:
        """The journal at ``path``, or ``None`` while another run writes or sends it.

        Raises:
            OSError: It cannot be opened.
            ValueError: It holds something else than entries.
        """
        stream = io.FileIO(path, "r+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return cls(path, stream)
        except BlockingIOError:
            stream.close()
            return None
        except (OSError, ValueError):
            stream.close()
            raise

    def append(self, *entries: Entry) -> None:
        """Add entries; once the disk refused some they are kept in memory only."""
        with self._lock:
            self._pending.extend(entries)
            self._write(*entries)

    def head(self) -> list[Entry]:
        """The next entries that MLflow takes in one call: at most :data:`BATCH` metrics or one of another kind."""
        with self._lock:
            batch = self._pending[:BATCH]
        metrics = next((i for i, entry in enumerate(batch) if entry.kind != "metric"), len(batch))
        return batch[: metrics or 1]

    def note_sent(self, count: int, run_id: str) -> None:
        """Note that the run has the next ``count`` entries: a later replay begins after them."""
        with self._lock:
            del self._pending[:count]
            self._sent += count
            self.run_id = run_id
            self._write(Entry(kind="sent", step=self._sent, text=run_id))

    def close(self, *, delivered: bool) -> None:
        """Release the lock, and delete the file when all of it was delivered."""
        with self._lock:
            if delivered:
                with contextlib.suppress(OSError):  # one that stays says that all was sent
                    self.path.unlink()
            self._stream.close()

    def _write(self, *entries: Entry) -> None:
        if self._stream.closed or not self._writable:
            return
        data = "".join(entry.model_dump_json(exclude_defaults=True) + "\n" for entry in entries).encode()
        try:
            if self._stream.write(data) != len(data):
                raise OSError("no space left")
        except OSError as error:
            self._writable = False  # what follows half a line would not be readable
            logger.warning("%s cannot be written, what follows is kept in memory only: %s", self.path, error)
