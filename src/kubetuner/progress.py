"""Progress of long work: a bar in a terminal, one line every few seconds in a pod's log."""

import logging
import sys
import time
from typing import Self

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 5.0


class Progress:
    """Counts finished units of work and shows rate and time left.

    In a terminal this is a tqdm bar. Elsewhere (a pod, a CI log) it writes one log line every
    :data:`LOG_INTERVAL_SECONDS` seconds and one when the work ends. ``quiet`` shows nothing.
    """

    def __init__(self, label: str, total: int, unit: str, initial: int = 0, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._label, self._total, self._unit = label, total, unit
        self._done, self._initial = initial, initial
        self._started = self._last_line = time.monotonic()
        self._note = ""
        self._bar = (
            tqdm(total=total, initial=initial, desc=label, unit=f" {unit}", dynamic_ncols=True)
            if sys.stderr.isatty() and not quiet
            else None
        )

    def advance(self, count: int = 1, note: str = "") -> None:
        """Record ``count`` finished units; ``note`` (such as ``loss 0.031``) is shown beside the rate."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LOG_INTERVAL_SECONDS:
            self._line()

    def close(self) -> None:
        """Show the final state."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._line()

    def _line(self) -> None:
        if self._quiet:
            return
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._started
        rate = (self._done - self._initial) / elapsed if elapsed > 0 else 0.0
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        note = f", {self._note}" if self._note else ""
        logger.info(
            "%s: %d/%d %s, %.1f %s/s, %.0f s left%s",
            self._label, self._done, self._total, self._unit, rate, self._unit, left, note,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
