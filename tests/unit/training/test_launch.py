"""Processes that end well, badly, not at all, or because they are told to."""

import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from kubetuner.config.sections.steps import DatasetSampling, ModelRef, TrainSection
from kubetuner.errors import InputError, TrainingError
from kubetuner.training.distributed import launch as launching
from kubetuner.training.distributed.failures import known_error
from kubetuner.training.distributed.launch import Group, launch, run_workers, wanted_processes
from kubetuner.training.distributed.pulse import Limits, read_limits
from kubetuner.training.interruption import TerminatedError

WORKER = "tests.unit.training.worker"


def _argument(out: Path, *orders: str) -> str:
    return json.dumps({"out": str(out), "orders": orders})


def test_each_process_knows_its_place(tmp_path: Path) -> None:
    launch(WORKER, _argument(tmp_path, *["tells its environment"] * 3), 3)

    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [(one["RANK"], one["LOCAL_RANK"]) for one in told] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {(one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["MASTER_ADDR"]) for one in told} == {
        ("3", "3", "localhost")
    }
    assert all(int(one["OMP_NUM_THREADS"]) >= 1 for one in told)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (("hangs", "is killed"), r"process 1 of 2 was ended by SIGKILL; the pod may be short of memory.*to resume"),
        (("loses its connection", "is killed"), r"process 1 of 2 was ended by SIGKILL"),
        (("is aborted", "loses its connection"), r"^Connection closed by peer$"),
        (("is aborted", "hangs"), r"process 0 of 2 was ended by SIGABRT; run again"),
        (("loses its connection", "finds a sample"), r"^the loss of step 3 is not finite for a/b\.png$"),
        (("hangs", "says nothing"), r"ended without saying why \(exit codes: process 1: 3\)"),
    ],
)
def test_the_first_error_is_the_one_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orders: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(launching, "GRACE_SECONDS", 1.0)
    started = time.monotonic()

    with pytest.raises(TrainingError, match=message):
        launch(WORKER, _argument(tmp_path, *orders), 2)

    assert time.monotonic() - started < 30


def test_a_process_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "GRACE_SECONDS", 1.0)
    monkeypatch.setenv("KUBETUNER_PROCESS_TIMEOUT_MINUTES", "0.08")
    host = re.escape(socket.gethostname())
    named = rf"^process 1 \(number \d+ on {host}\) of 2 has not been heard of for 0.08 minutes"

    with pytest.raises(TrainingError, match=named):
        launch(WORKER, _argument(tmp_path, "trains", "is stopped"), 2)

    assert not list(tmp_path.glob("done-*"))


def test_a_machine_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one even, whose process keeps the store: it refuses nothing, and does not answer."""
    monkeypatch.setattr(launching, "GRACE_SECONDS", 1.0)
    monkeypatch.setenv("KUBETUNER_PROCESS_TIMEOUT_MINUTES", "0.08")
    (tmp_path / "argument").write_text(_argument(tmp_path, "is stopped", "trains"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first = launching._start(WORKER, tmp_path, Group(1, "127.0.0.1", port, machines=2), 0)
    try:
        ended = run_workers(WORKER, tmp_path, Group(1, "127.0.0.1", port, machines=2, machine=1))
    finally:
        first.kill()
        first.communicate()

    assert ended.codes == {1: 1}
    assert "process 0, which keeps the store where they meet" in str(known_error(tmp_path))


def test_a_process_that_lives_and_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its own time: one that works is heard of, however long it works."""
    monkeypatch.setattr(launching, "GRACE_SECONDS", 1.0)
    monkeypatch.setenv("KUBETUNER_PROCESS_TIMEOUT_MINUTES", "0.08")
    monkeypatch.setenv("KUBETUNER_PROCESS_PATIENCE_MINUTES", "0.1")
    named = r"^process 1 \(.*\) of 2 has not come for 0.1 minutes to where others wait"

    with pytest.raises(TrainingError, match=named):
        launch(WORKER, _argument(tmp_path, "trains", "takes long"), 2)

    assert not list(tmp_path.glob("done-*"))


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
@pytest.mark.parametrize("name", ["KUBETUNER_PROCESS_TIMEOUT_MINUTES", "KUBETUNER_PROCESS_PATIENCE_MINUTES"])
def test_how_long_a_process_is_waited_for_is_a_number(name: str, text: str) -> None:
    with pytest.raises(InputError, match=f"{name} is '{text}'; expected minutes above 0"):
        read_limits({name: text})
    assert read_limits({}) == Limits(silent=600, absent=5400)


def test_being_told_to_stop_lets_every_process_save(tmp_path: Path) -> None:
    def tell() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    with pytest.raises(TerminatedError, match="after step 3 of 9"):
        launch(WORKER, _argument(tmp_path, *["saves when told"] * 2), 2)
    teller.join()

    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts this machine's GPUs")
def test_only_one_process_is_wanted_among_those_that_torchrun_started(monkeypatch: pytest.MonkeyPatch) -> None:
    section = TrainSection(
        model=ModelRef(family="sana", path="x"), model_type="full", datasets=(DatasetSampling(id="a"),),
        max_train_steps=1, num_train_processes=3,
    )  # fmt: skip
    assert wanted_processes(section) == 3
    assert wanted_processes(section.model_copy(update={"num_train_processes": 0})) == 1
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert wanted_processes(section) == 1
