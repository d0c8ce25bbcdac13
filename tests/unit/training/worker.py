"""A light stand-in for the train step's worker: does what the launcher's argument says of its rank."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from kubetuner.config.sections.steps import TrainSection
from kubetuner.errors import TrainingError
from kubetuner.training.distributed.failures import report
from kubetuner.training.interruption import TerminatedError


def main(folder: Path) -> int:
    rank = int(os.environ["RANK"])
    argument = json.loads((folder / "argument").read_text())
    out = Path(argument["out"])
    orders = argument["orders"][rank]
    if orders == "saves when told":

        def save(_number: int, _frame: object) -> None:
            time.sleep(0.5)
            (out / f"saved-{rank}").touch()
            report(folder, rank, TerminatedError("stopped by SIGTERM after step 3 of 9"))
            os._exit(1)

        signal.signal(signal.SIGTERM, save)
        (out / f"ready-{rank}").touch()
        time.sleep(60)
    elif orders == "tells its environment":
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
        (out / f"{rank}.json").write_text(json.dumps({name: os.environ[name] for name in names}))
    elif orders == "is aborted":
        os.kill(os.getpid(), signal.SIGABRT)
    elif orders == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif orders == "loses its connection":
        time.sleep(0.2)
        report(folder, rank, RuntimeError("Connection closed by peer"))
        return 1
    elif orders == "finds a sample":
        report(folder, rank, TrainingError("the loss of step 3 is not finite for a/b.png"))
        return 1
    elif orders == "says nothing":
        return 3
    elif orders in ("trains", "is stopped", "takes long"):
        train(rank, orders, out)
    elif orders == "hangs":
        time.sleep(60)
    return 0


def train(rank: int, orders: str, out: Path) -> None:
    """Meet the others, and wait for them; or do not come, stopped or at work."""
    from kubetuner.training.distributed.processes import joined

    settings = {"model": {"family": "sana", "path": "x"}, "model_type": "full", "datasets": [], "max_train_steps": 1}
    with joined(TrainSection.model_validate(settings)) as processes:
        processes.wait()
        if orders == "is stopped":
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGSTOP)
        if orders == "takes long":
            time.sleep(30)
        processes.wait()
        (out / f"done-{rank}").touch()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
