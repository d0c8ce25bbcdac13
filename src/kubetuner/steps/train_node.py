"""What each node of a TrainJob runs: its processes, in the environment that Kubeflow Trainer gives to ``torchrun``.

``torchrun`` itself is not used, as in one pod; see :mod:`kubetuner.training.distributed.launch`.
"""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from kubetuner.errors import InputError
from kubetuner.steps.train import WORKER_MODULE, WorkerRequest
from kubetuner.training.distributed.failures import first_error, report, report_codes
from kubetuner.training.distributed.launch import ARGUMENT_FILE, Group, run_workers, wanted_processes


def main(folder: Path) -> int:
    """Train on this node until all its processes have ended; returns the exit code.

    Args:
        folder: On the volume that all nodes share: holds the task, and receives what goes wrong.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    node = os.environ.get("PET_NODE_RANK", "?")
    try:
        request = WorkerRequest.model_validate_json((folder / ARGUMENT_FILE).read_bytes())
        group = group_of(os.environ, request.section.num_train_processes or wanted_processes(request.section))
    except (InputError, OSError) as error:
        said = InputError(f"{folder}: {error}; is the claim mounted?") if isinstance(error, OSError) else error
        if folder.is_dir():
            report(folder, f"node-{node}", said)
        print(f"error: node {node}: {said}", file=sys.stderr)  # noqa: T201
        return 2
    ended = run_workers(WORKER_MODULE, folder, group)
    if not ended.codes:
        return 0
    count = group.machines * group.here
    report_codes(folder, group.machine, count, ended.codes)
    cause = first_error(folder, ended.codes, count, stopped=ended.stopped)
    print(f"error: node {node}: {cause}", file=sys.stderr)  # noqa: T201
    return 1


def group_of(environment: Mapping[str, str], processes: int) -> Group:
    """Who trains together, by the variables that Trainer sets.

    Args:
        environment: Holds ``PET_NNODES``, ``PET_NODE_RANK``, ``PET_MASTER_ADDR`` and ``PET_MASTER_PORT``.
        processes: Of this node, and of every other.

    Raises:
        InputError: One is missing, or no number where it should be.
    """
    names = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_PORT")
    wrong = [f"{name} is {environment.get(name)!r}" for name in names if not environment.get(name, "").isdecimal()]
    address = environment.get("PET_MASTER_ADDR", "")
    if wrong or not address:
        wrong += [] if address else ["PET_MASTER_ADDR is missing"]
        raise InputError(f"this is no node of a TrainJob, or its runtime has no mlPolicy.torch: {'; '.join(wrong)}.")
    machines, machine, port = (int(environment[name]) for name in names)
    return Group(processes, address, port, machines, machine)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
