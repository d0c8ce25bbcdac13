"""The train step with two processes: what it leaves behind, and that any number of processes can go on from it."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kubetuner.artifacts import ModelArtifact, read_artifact, read_rows, verify_files
from kubetuner.config.sections.distribution import FsdpSettings
from kubetuner.config.sections.objective import EmaSettings
from kubetuner.errors import ArtifactError
from kubetuner.steps.train import _checkpoints, train
from kubetuner.training.checkpoints import LossPoint
from kubetuner.training.distributed.processes import ALONE as ALONE_HERE
from kubetuner.training.interruption import TerminatedError
from tests.unit.steps.test_train import _caches, _local, _section  # noqa: F401 - the fixture is used by being here

TWO = {"num_train_processes": 2, "gradient_accumulation_steps": 1}
ALONE = {"num_train_processes": 1, "gradient_accumulation_steps": 2}
SHARED = {"mixed_precision": "no", "adam_epsilon": 1e-4, "max_train_steps": 60, "checkpoint_step_interval": 2}


def test_a_run_that_is_stopped_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Two that share the weights out are stopped; one goes on; all is as if one had done everything."""
    caches, out = _caches(tmp_path, "sana"), tmp_path / "parts"
    settings = SHARED | {"ema": EmaSettings(decay=0.9)}
    whole = train(_section(tmp_path, "sana", **settings, **ALONE), *caches, tmp_path / "whole")
    teller = threading.Thread(target=_stop_at_a_checkpoint, args=(out,))
    teller.start()

    with pytest.raises(TerminatedError, match=r"stopped by SIGTERM after step \d+ of 60; a checkpoint was saved"):
        train(_section(tmp_path, "sana", **settings, **TWO, fsdp=FsdpSettings()), *caches, out)
    teller.join()
    assert not (out / "artifact.json").exists()
    artifact = train(_section(tmp_path, "sana", **settings, **ALONE), *caches, out)

    assert artifact.fingerprint == whole.fingerprint
    assert _losses(out) == pytest.approx(_losses(tmp_path / "whole"), rel=1e-3)
    assert not (out / "checkpoints").exists()


def test_two_processes_leave_one_model(tmp_path: Path) -> None:
    caches = _caches(tmp_path, "sdxl")
    settings = {"mixed_precision": "no", "model_type": "lora", "lora": {"rank": 2, "alpha": 8.0}, "num_train_epochs": 2}
    settings |= {"max_train_steps": 0, "adam_epsilon": 1e-4}
    alone = train(_section(tmp_path, "sdxl", **settings, **ALONE), *caches, tmp_path / "alone")

    artifact = train(_section(tmp_path, "sdxl", **settings, **TWO), *caches, tmp_path / "two")

    assert artifact == read_artifact(tmp_path / "two", ModelArtifact)
    verify_files(tmp_path / "two", artifact)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        path.name for path in (tmp_path / "alone").iterdir()
    }
    assert (artifact.fingerprint, artifact.steps) == (alone.fingerprint, alone.steps) == (alone.fingerprint, 2)
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "alone"), rel=1e-4)
    one, other = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("alone", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=1e-5)


def test_what_is_wrong_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    latents, texts = _caches(tmp_path, "sana")
    (latents[0] / "artifact.json").unlink()

    with pytest.raises(ArtifactError, match="did not finish"):
        train(_section(tmp_path, "sana", **TWO), latents, texts, tmp_path / "out")

    assert "Traceback" not in capfd.readouterr().err


def test_checkpoints_of_another_number_of_batches_are_named_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section = _section(tmp_path, "sana", gradient_accumulation_steps=4)
    root, key = _checkpoints(section, ["data"], tmp_path, ALONE_HERE)
    (root / key / "checkpoint-7").mkdir(parents=True)
    fewer = section.model_copy(update={"gradient_accumulation_steps": 3})

    assert _checkpoints(section, ["data"], tmp_path, ALONE_HERE) == (root, key)
    assert not caplog.records
    assert _checkpoints(fewer, ["data"], tmp_path, ALONE_HERE)[1] != key
    assert "holds checkpoints of this run with 4 batches per optimizer step; this one makes 3" in caplog.text


def _stop_at_a_checkpoint(out: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list(out.glob("checkpoints/*/checkpoint-*")):
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.05)


def _losses(out: Path) -> list[float]:
    return [point.loss for point in read_rows(out, "losses.jsonl", LossPoint)]
