"""What a step logged, on disk until MLflow has it."""

import fcntl
import logging
import threading
import uuid
from pathlib import Path
from typing import Literal, Self, TextIO

from pydantic import Field

from kubetuner.artifacts import Record

logger = logging.getLogger(__name__)


class Entry(Record):
    """One line of a journal; which fields mean something depends on ``kind``.

    Attributes:
        kind: ``start`` creates the run, ``run`` notes its MLflow id, ``end`` terminates it.
        key: Step, metric key, image key or artifact path.
        text: Group (``start``), run id (``run``), text, picture's file or status.
        time: Milliseconds since 1970.
    """

    kind: Literal["start", "run", "params", "metric", "image", "text", "end"]
    key: str = ""
    text: str = ""
    value: float = 0.0
    step: int = 0
    time: int = 0
    params: dict[str, str] = Field(default_factory=dict)


class Journal:
    """The entries of one run, in memory and on disk, locked while their writer lives."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        self.path, self._stream = path, stream
        self.entries = [Entry.model_validate_json(line) for line in stream if line.endswith("\n")]
        self._lock = threading.Lock()

    @classmethod
    def create(cls, folder: Path) -> Self:
        """A new journal in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex}.jsonl"
        journal = cls.adopt(path)
        if journal is None:
            raise OSError(f"{path} is locked")
        return journal

    @classmethod
    def adopt(cls, path: Path) -> Self | None:
        """The journal at ``path``, or ``None`` while another run writes or sends it."""
        stream = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stream.seek(0)
            return cls(path, stream)
        except BlockingIOError:
            stream.close()
            return None
        except (OSError, ValueError):
            stream.close()
            raise

    def append(self, *entries: Entry) -> None:
        """Add entries; where the disk is full they are kept in memory only."""
        with self._lock:
            self.entries.extend(entries)
            if self._stream.closed:
                return
            try:
                self._stream.writelines(entry.model_dump_json(exclude_defaults=True) + "\n" for entry in entries)
                self._stream.flush()
            except OSError as error:
                logger.warning("%s cannot be written: %s", self.path, error)

    def close(self, *, delivered: bool) -> None:
        """Release the lock, and delete the file when all of it was delivered."""
        with self._lock:
            if delivered:
                self.path.unlink(missing_ok=True)
            self._stream.close()
