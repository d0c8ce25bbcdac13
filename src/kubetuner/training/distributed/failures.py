"""Why the processes of a training ended, as the one error that a person needs to see; knows no torch."""

import signal
import time
from collections.abc import Mapping
from pathlib import Path

from kubetuner.artifacts import Record, write_text
from kubetuner.errors import ArtifactError, DatasetError, InputError, KubetunerError, TrainingError
from kubetuner.training.interruption import TerminatedError

_KINDS: tuple[type[KubetunerError], ...] = (TerminatedError, TrainingError, ArtifactError, DatasetError, InputError)
_CODES = ".codes"


class _Failure(Record):
    """What one process says: the class of its error, a message for a person, and when, in seconds since the epoch."""

    kind: str
    message: str
    at: float


class _Codes(Record):
    """How processes of one machine ended, by rank, of ``count`` on all machines."""

    count: int
    codes: dict[int, int]


def report(folder: Path, who: int | str, error: Exception, message: str = "") -> None:
    """Leave word for :func:`first_error`; ``message`` in place of the error's own text.

    Args:
        folder: Where; all processes may share it.
        who: The process's rank, or the name of another that has something to say.
        error: What went wrong.
        message: Text for a person.
    """
    said = _Failure(kind=type(error).__name__, message=message or str(error), at=time.time())
    temporary = folder / f".{who}.tmp"
    temporary.write_text(said.model_dump_json(), encoding="utf-8")
    temporary.rename(folder / f"{who}.json")


def report_codes(folder: Path, node: int, count: int, codes: Mapping[int, int]) -> None:
    """Leave the exit codes of a machine's processes, by rank, for one that looks at several machines.

    Args:
        folder: Where all machines do.
        node: Which machine.
        count: Processes of all machines.
        codes: Of those that failed.
    """
    write_text(folder / f"node-{node}{_CODES}", _Codes(count=count, codes=dict(codes)).model_dump_json())


def exit_codes(folder: Path) -> tuple[dict[int, int], int]:
    """All codes that :func:`report_codes` has left, and how many processes there were."""
    told = [_Codes.model_validate_json(file.read_bytes()) for file in sorted(folder.glob(f"node-*{_CODES}"))]
    codes = {rank: code for one in told for rank, code in one.codes.items()}
    return codes, max((one.count for one in told), default=0)


def forget(folder: Path) -> None:
    """Remove what processes of an earlier attempt have left."""
    for file in [*folder.glob("*.json"), *folder.glob(f"*{_CODES}")]:
        file.unlink(missing_ok=True)


def known_error(folder: Path) -> KubetunerError | None:
    """The earliest error of ours that anyone has told of in ``folder``, whoever it was."""
    ours = {kind.__name__: kind for kind in _KINDS}
    told = (_Failure.model_validate_json(file.read_bytes()) for file in folder.glob("*.json"))
    said = sorted((one for one in told if one.kind in ours), key=lambda one: one.at)
    return ours[said[0].kind](said[0].message) if said else None


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
