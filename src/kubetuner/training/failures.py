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
    """The cause: an error of ours, or who was killed, or the earliest other word that a process has left.

    What is left by those that only lost their connection comes last; NCCL and gloo may abort them for it.

    Args:
        folder: Where :func:`report` wrote.
        codes: Exit codes of the processes that failed by themselves, by rank, in the order of their end.
        count: How many processes there were.
        stopped: All were told to stop.
    """
    ours = {kind.__name__: kind for kind in _KINDS}
    files = [folder / f"{rank}.json" for rank in codes]
    said = sorted(
        (_Failure.model_validate_json(file.read_bytes()) for file in files if file.exists()),
        key=lambda failure: (failure.kind not in ours, failure.at),
    )
    if said and said[0].kind in ours:
        return ours[said[0].kind](said[0].message)
    if stopped:
        return TerminatedError("stopped by SIGTERM; run again to resume")
    killed = {rank: signal.Signals(-code) for rank, code in codes.items() if code < 0}
    for rank, number in killed.items():
        if number != signal.SIGABRT or not said:
            hint = "; the pod may be short of memory" if number == signal.SIGKILL else ""
            return TrainingError(f"process {rank} of {count} was ended by {number.name}{hint}; run again to resume")
    if said:
        return TrainingError(said[0].message)
    listed = ", ".join(f"process {rank}: {code}" for rank, code in codes.items())
    return TrainingError(f"training ended without saying why (exit codes: {listed}); what it printed is above")
