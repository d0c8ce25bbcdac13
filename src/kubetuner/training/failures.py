"""Why the processes of a training ended, as the one error that a person needs to see; knows no torch."""

import signal
import time
from collections.abc import Mapping
from pathlib import Path

from kubetuner.artifacts import Record
from kubetuner.errors import ArtifactError, DatasetError, InputError, KubetunerError, TrainingError
from kubetuner.training.interruption import TerminatedError

_KINDS: tuple[type[KubetunerError], ...] = (TerminatedError, TrainingError, ArtifactError, DatasetError, InputError)


class _Failure(Record):
    """What one process says: the class of its error, a message for a person, and when, in seconds since the epoch."""

    kind: str
    message: str
    at: float


def report(folder: Path, rank: int, error: Exception, message: str = "") -> None:
    """Leave word for :func:`first_error`; ``message`` in place of the error's own text."""
    said = _Failure(kind=type(error).__name__, message=message or str(error), at=time.time())
    temporary = folder / f".{rank}.tmp"
    temporary.write_text(said.model_dump_json(), encoding="utf-8")
    temporary.rename(folder / f"{rank}.json")


def first_error(folder: Path, codes: Mapping[int, int], count: int, *, stopped: bool) -> KubetunerError:
    """Who was killed, or else the earliest word that a process has left.

    Args:
        folder: Where :func:`report` wrote.
        codes: Exit codes of the processes that failed by themselves, by rank, in the order of their end.
        count: How many processes there were.
        stopped: All were told to stop.
    """
    for rank, code in codes.items():
        if code < 0 and not stopped:
            hint = "; the pod may be short of memory" if -code == signal.SIGKILL else ""
            name = signal.Signals(-code).name
            return TrainingError(f"process {rank} of {count} was ended by {name}{hint}; run again to resume")
    files = [folder / f"{rank}.json" for rank in codes]
    said = [_Failure.model_validate_json(file.read_bytes()) for file in files if file.exists()]
    if not said and stopped:
        return TerminatedError("stopped by SIGTERM; run again to resume")
    if not said:
        listed = ", ".join(f"process {rank}: {code}" for rank, code in codes.items())
        return TrainingError(f"training ended without saying why (exit codes: {listed}); what it printed is above")
    # Of two that fail together, the one with an error of ours knows why: the other has lost its connection.
    ours = {kind.__name__: kind for kind in _KINDS}
    first = min(said, key=lambda failure: (failure.kind not in ours, failure.at))
    return ours.get(first.kind, TrainingError)(first.message)
