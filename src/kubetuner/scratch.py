"""Rows that are needed for as long as a step works and that memory should not hold, however many there are."""

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from typing import Any

Value = int | bytes | None

_FETCHED_AT_ONCE = 256


class Scratch:
    """A database in a temporary file that is gone with this object, or the process; memory holds 1 MB of it.

    SQLite puts what does not fit there, and what it sorts, where ``SQLITE_TMPDIR`` or ``TMPDIR`` says, else in
    ``/var/tmp`` or ``/tmp``. Several threads may use it.

    Args:
        schema: Statements that make the tables.
    """

    def __init__(self, *schema: str) -> None:
        # Without a name it is such a file; what threads must not do at once, the lock keeps them from.
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._lock = threading.RLock()
        # Nobody else can see it and nothing outlives it: one transaction, no journal, nothing overwritten with zeros.
        settings = ("cache_size = -1000", "journal_mode = OFF", "secure_delete = OFF")
        for statement in (*(f"PRAGMA {setting}" for setting in settings), "BEGIN", *schema):
            self._connection.execute(statement)

    def run(self, statement: str, values: Iterable[Value] = ()) -> None:
        """Execute one statement."""
        with self._lock:
            self._connection.execute(statement, tuple(values))

    def run_each(self, statement: str, rows: Iterable[tuple[Value, ...]]) -> None:
        """Execute one statement with each of ``rows``."""
        with self._lock:
            self._connection.executemany(statement, rows)

    def rows(self, statement: str, values: Iterable[Value] = ()) -> Iterator[tuple[Any, ...]]:
        """What a query finds, a few rows in memory at a time."""
        with self._lock:
            cursor = self._connection.execute(statement, tuple(values))
            found = cursor.fetchmany(_FETCHED_AT_ONCE)
        while found:
            yield from found
            with self._lock:
                found = cursor.fetchmany(_FETCHED_AT_ONCE)

    def row(self, statement: str, values: Iterable[Value] = ()) -> tuple[Any, ...] | None:
        """The first row that a query finds, if any."""
        with self._lock:
            found: tuple[Any, ...] | None = self._connection.execute(statement, tuple(values)).fetchone()
        return found

    def number(self, statement: str) -> int:
        """The one number that a query finds."""
        (found,) = self.row(statement) or (0,)
        return int(found)

    def __del__(self) -> None:
        self._connection.close()
