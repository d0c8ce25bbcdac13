"""Starting the processes of one pod, and making one message of what goes wrong in any of them.

What ``torchrun --standalone`` would do, but that a process that is told to stop has all the time it needs to save
a checkpoint (``torchrun`` kills after 30 s), and that a person sees the first error and no other.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

import kubetuner
from kubetuner.config.sections import TrainSection
from kubetuner.errors import ArtifactError, DatasetError, InputError, KubetunerError, TrainingError
from kubetuner.training.interruption import StopRequest, TerminatedError
from kubetuner.training.threads import available_cpus

logger = logging.getLogger(__name__)

# For the others to find out by themselves that one is gone, and to say so to MLflow.
GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.1
_KINDS: tuple[type[KubetunerError], ...] = (TerminatedError, TrainingError, ArtifactError, DatasetError, InputError)


def wanted_processes(section: TrainSection) -> int:
    """How many processes to start: 1 where this one is to train, alone or among those that ``torchrun`` started.

    Raises:
        InputError: More are asked for than there are GPUs.
    """
    if "WORLD_SIZE" in os.environ:
        return 1
    gpus, asked = torch.cuda.device_count(), section.num_train_processes
    if asked > gpus > 0:
        raise InputError(
            f"num_train_processes is {asked} and {gpus} GPU(s) can be seen here; lower it, or ask for more "
            "(KUBETUNER_GPUS when the pipeline is compiled, CUDA_VISIBLE_DEVICES on this machine)."
        )
    if asked > 1 and not gpus:
        logger.warning("num_train_processes is %d and there is no GPU: they share the CPU", asked)
    return asked or gpus or 1


@dataclass(frozen=True)
class Failure:
    """What ended a process.

    Attributes:
        kind: Class of the error.
        message: For a person; of errors that are not ours, with the traceback.
        at: Seconds since the epoch.
    """

    kind: str
    message: str
    at: float


def launch(module: str, argument: str, count: int) -> None:
    """Run ``python -m module`` in ``count`` processes until all have ended well; SIGTERM is passed on to them.

    Args:
        module: Finds ``argument`` in the file that is its first argument, and calls :func:`report` on failure.
        argument: Any text.
        count: Processes.

    Raises:
        TerminatedError: SIGTERM arrived, and they stopped.
        KubetunerError: The first error of a process, or how it died; the others were stopped.
    """
    with tempfile.TemporaryDirectory(prefix="kubetuner-") as name, StopRequest() as stop:
        folder = Path(name)
        (folder / "argument").write_text(argument, encoding="utf-8")
        # Lives here and not in the first worker, so that its port cannot be lost to someone else meanwhile.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        workers = [_start(module, folder, rank, count, store.port) for rank in range(count)]
        try:
            fallen = _watch(workers, stop)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if fallen:
            raise _first_error(folder, fallen, workers, stopped=stop.received)


def report(folder: Path, rank: int, failure: Failure) -> None:
    """Leave word for the process that called :func:`launch`."""
    temporary = folder / f".{rank}.tmp"
    temporary.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    temporary.rename(folder / f"{rank}.json")


def _start(module: str, folder: Path, rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    """One worker, with the environment that ``torchrun`` would give it."""
    path = [str(Path(kubetuner.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    settings = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
    threads = {"OMP_NUM_THREADS": str(max(1, available_cpus() // count))}
    command = [sys.executable, "-m", module, str(folder)]
    # Its end of the pipe closes when this process ends, however it ends: the worker then ends too.
    return subprocess.Popen(command, env=threads | os.environ | settings, stdin=subprocess.PIPE)


def _watch(workers: list[subprocess.Popen[bytes]], stop: StopRequest) -> list[int]:
    """Wait for the workers; returns the ranks of those that failed before any was killed, in the order of their end."""
    told, fallen, deadline = False, [], float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        if stop.received and not told:
            told = True
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
        ended = [rank for rank, worker in enumerate(workers) if worker.poll()]
        fallen += [rank for rank in ended if rank not in fallen]
        if fallen and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(_POLL_SECONDS)
    return fallen + [rank for rank, worker in enumerate(workers) if worker.poll() and rank not in fallen]


def _first_error(
    folder: Path, fallen: list[int], workers: list[subprocess.Popen[bytes]], *, stopped: bool
) -> KubetunerError:
    """What a person needs to know: who was killed, or else the earliest of the workers' own errors."""
    for rank in fallen:
        code = workers[rank].returncode
        if code < 0 and not stopped:
            name = signal.Signals(-code).name
            hint = "; the pod may be short of memory" if -code == signal.SIGKILL else ""
            return TrainingError(f"process {rank} of {len(workers)} was ended by {name}{hint}; run again to resume")
    files = [folder / f"{rank}.json" for rank in fallen]
    failures = [Failure(**json.loads(file.read_text(encoding="utf-8"))) for file in files if file.exists()]
    if not failures and stopped:
        return TerminatedError("stopped by SIGTERM; run again to resume")
    if not failures:
        codes = ", ".join(f"{rank}: {workers[rank].returncode}" for rank in fallen)
        return TrainingError(f"processes ended without saying why (exit codes {codes}); what they printed is above")
    # Of two that fail together, the one that knows why is ours: the other lost its connection.
    ours = {kind.__name__: kind for kind in _KINDS}
    first = min(failures, key=lambda failure: (failure.kind not in ours, failure.at))
    return ours.get(first.kind, TrainingError)(first.message)
