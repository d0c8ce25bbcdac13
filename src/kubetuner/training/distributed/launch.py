"""Starting the processes of a pod, and making one message of what goes wrong in any of them.

What ``torchrun --standalone`` would do, but that a process that is told to stop has all the time it needs to save
a checkpoint (``torchrun`` kills after 30 s), and that a person sees the first error and no other. torch is only loaded
to count GPUs and to keep the store.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import kubetuner
from kubetuner.config.sections.steps import TrainSection
from kubetuner.errors import InputError
from kubetuner.threads import available_cpus
from kubetuner.training.distributed.failures import first_error
from kubetuner.training.distributed.pulse import WORDS_VARIABLE
from kubetuner.training.interruption import StopRequest

logger = logging.getLogger(__name__)

# For the others to find out by themselves that one is gone, and to say so to MLflow.
GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.1
ARGUMENT_FILE = "argument"


def is_started() -> bool:
    """Whether ``torchrun``, a TrainJob or this module started this process: then it starts no others."""
    return "WORLD_SIZE" in os.environ


def wanted_processes(section: TrainSection) -> int:
    """How many processes to start: 1 where this one is to train, alone or among those that ``torchrun`` started.

    Raises:
        InputError: More are asked for than there are GPUs.
    """
    if is_started():
        return 1
    import torch

    gpus, asked = torch.cuda.device_count(), section.num_train_processes
    if asked > gpus > 0:
        raise InputError(
            f"num_train_processes is {asked} and {gpus} GPU(s) can be seen here; lower it, or ask for more "
            "(KUBETUNER_GPUS when the pipeline is compiled, CUDA_VISIBLE_DEVICES on this machine)."
        )
    if asked > 1 and not gpus:
        logger.warning("num_train_processes is %d and there is no GPU: they share the CPU", asked)
    return asked or gpus or 1


def launch(module: str, argument: str, count: int) -> None:
    """Run ``python -m module`` in ``count`` processes until all have ended well; SIGTERM is passed on to them.

    Args:
        module: Finds ``argument`` in the file that is its first argument, and calls
            :func:`~kubetuner.training.distributed.failures.report` on failure.
        argument: Any text.
        count: Processes.

    Raises:
        TerminatedError: SIGTERM arrived, and they stopped.
        KubetunerError: The first error of a process, or how it died; the others were stopped.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory(prefix="kubetuner-") as name:
        folder = Path(name)
        (folder / ARGUMENT_FILE).write_text(argument, encoding="utf-8")
        # Lives here and not in the first worker, so that its port cannot be lost to someone else meanwhile.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        ended = run_workers(module, folder, Group(count, "localhost", store.port))
        if ended.codes:
            raise first_error(folder, ended.codes, count, stopped=ended.stopped)


@dataclass(frozen=True)
class Group:
    """Processes that train together, and where they meet.

    Attributes:
        here: How many of them this machine runs; every machine runs as many.
        address: Where the store listens in which they find each other.
        port: Its port.
        machines: How many machines there are. With several, the first process of the first one keeps the store.
        machine: Which one this is, from 0.
    """

    here: int
    address: str
    port: int
    machines: int = 1
    machine: int = 0


@dataclass(frozen=True)
class Ended:
    """How the processes of this machine ended.

    Attributes:
        codes: Exit codes of those that failed by themselves, by rank, in the order of their end; empty if all is well.
        stopped: SIGTERM had arrived.
    """

    codes: dict[int, int]
    stopped: bool


def run_workers(module: str, folder: Path, group: Group) -> Ended:
    """Run this machine's processes of ``group`` until all have ended; see :func:`launch`.

    Args:
        module: As there.
        folder: Holds the argument in :data:`ARGUMENT_FILE` and receives what goes wrong.
        group: Who trains together.
    """
    first = group.machine * group.here
    with StopRequest() as stop:
        workers = [_start(module, folder, group, place) for place in range(group.here)]
        try:
            fallen = _watch(workers, stop)
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
        return Ended({first + place: workers[place].returncode for place in fallen}, stop.received)


def _start(module: str, folder: Path, group: Group, place: int) -> subprocess.Popen[bytes]:
    """One worker, with the environment that ``torchrun`` would give it."""
    path = [str(Path(kubetuner.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    settings = {
        "RANK": str(group.machine * group.here + place),
        "LOCAL_RANK": str(place),
        "WORLD_SIZE": str(group.machines * group.here),
        "LOCAL_WORLD_SIZE": str(group.here),
        "MASTER_ADDR": group.address,
        "MASTER_PORT": str(group.port),
        "TORCHELASTIC_USE_AGENT_STORE": str(group.machines == 1),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        WORDS_VARIABLE: str(folder),
    }
    threads = {"OMP_NUM_THREADS": str(max(1, available_cpus() // group.here))}
    command = [sys.executable, "-m", module, str(folder)]
    # Its end of the pipe closes when this process ends, however it ends: the worker then ends too.
    return subprocess.Popen(command, env=threads | os.environ | settings, stdin=subprocess.PIPE)


def _watch(workers: list[subprocess.Popen[bytes]], stop: StopRequest) -> list[int]:
    """Wait for the workers; returns which of them failed before any was killed, in the order of their end."""
    told, fallen, deadline = False, [], float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        if stop.received and not told:
            told = True
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
        ended = [place for place, worker in enumerate(workers) if worker.poll()]
        fallen += [place for place in ended if place not in fallen]
        if fallen and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(_POLL_SECONDS)
    return fallen + [place for place, worker in enumerate(workers) if worker.poll() and place not in fallen]
