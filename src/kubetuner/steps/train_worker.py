"""One of the processes that ``train`` starts; see :mod:`kubetuner.training.distributed.launch`."""

import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from kubetuner.errors import InputError, KubetunerError
from kubetuner.steps.train import WorkerRequest, train
from kubetuner.training.distributed.failures import report
from kubetuner.training.distributed.launch import ARGUMENT_FILE


def main(folder: Path) -> int:
    """Train as the process that the environment names; returns the exit code, and leaves word of what went wrong."""
    rank = int(os.environ["RANK"])
    level = logging.INFO if rank == 0 else logging.WARNING
    form = "%(message)s" if rank == 0 else f"[process {rank}] %(message)s"
    logging.basicConfig(level=level, format=form, stream=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher too, which ends its workers.
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    request = WorkerRequest.model_validate_json((folder / ARGUMENT_FILE).read_bytes())
    try:
        train(request.section, request.latents, request.text_embeds, request.out, dataset=request.dataset)
    except KubetunerError as error:
        report(folder, rank, error)
        return 2 if isinstance(error, InputError) else 1
    except Exception as error:  # noqa: BLE001 - the launcher raises it
        message = f"process {rank} failed: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        report(folder, rank, error, message)
        return 1
    return 0


def _end_with_the_launcher() -> None:
    """Block until standard input ends, which it does when the launcher is gone."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
