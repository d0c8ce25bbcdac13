"""A stopped run that is started again with something changed: another run, from its first step, and it says so."""

import logging
import shutil
from pathlib import Path

import pytest

from kubetuner.artifacts import LatentsArtifact, read_artifact, read_rows, write_artifact
from kubetuner.errors import TrainingError
from kubetuner.steps.train import train
from kubetuner.training.checkpoints import LossPoint
from tests.unit.conftest import fork, wait
from tests.unit.steps.test_train import _caches, _section

STOPPED = {"max_train_steps": 4, "checkpoint_step_interval": 1, "mixed_precision": "no"}
LEFT = "holds checkpoints of other settings or data alone: they are left alone, and training starts anew"


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkpoints of a run of four steps that never wrote its model."""
    for name in ("MLFLOW_TRACKING_URI", "KUBETUNER_STORE", "KUBETUNER_CHECKPOINTS"):
        monkeypatch.delenv(name, raising=False)
    caches, out = _caches(tmp_path, "sana"), tmp_path / "out"

    def work() -> None:
        from kubetuner.steps import train as module

        def fail(*_arguments: object) -> None:
            raise RuntimeError("the disk is full")

        module._write = fail  # type: ignore[assignment]
        train(_section(tmp_path, "sana", **STOPPED), *caches, out)

    assert wait(fork(work)) == 1
    assert len(list(out.glob("checkpoints/*/checkpoint-*"))) == 4
    return out


@pytest.mark.parametrize(
    "change",
    [
        {"train_batch_size": 1},
        {"learning_rate": 2e-3},
        {"max_train_steps": 6},
        {"caption_dropout_probability": 0.9},
    ],
    ids=str,
)
def test_other_settings_start_anew(
    stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, object]
) -> None:
    section, caches = _section(tmp_path, "sana", **{**STOPPED, **change}), _caches(tmp_path, "sana")
    _assert_anew(section, caches, stopped, tmp_path, caplog)


def test_other_data_start_anew(stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    latents, texts = _caches(tmp_path, "sana")
    artifact = read_artifact(latents[0], LatentsArtifact)
    write_artifact(latents[0], artifact.model_copy(update={"fingerprint": "other pictures"}))
    _assert_anew(_section(tmp_path, "sana", **STOPPED), (latents, texts), stopped, tmp_path, caplog)


def test_nothing_changed_goes_on(stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    section = _section(tmp_path, "sana", **STOPPED, checkpoints_total_limit=1)
    with caplog.at_level(logging.INFO):
        train(section, *_caches(tmp_path, "sana"), stopped)
    assert "Resuming after step 4 of 4" in caplog.text
    assert LEFT not in caplog.text


def test_a_checkpoint_that_is_asked_for_and_is_another_runs_is_refused(stopped: Path, tmp_path: Path) -> None:
    section = _section(tmp_path, "sana", **STOPPED, train_batch_size=1, resume_from_checkpoint="checkpoint-4")
    with pytest.raises(TrainingError, match=r"no usable 'checkpoint-4' in .* \(there: none\)"):
        train(section, *_caches(tmp_path, "sana"), stopped)


def _assert_anew(section, caches, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    kept = sorted(path.name for path in stopped.glob("checkpoints/*/checkpoint-*"))
    with caplog.at_level(logging.INFO):
        artifact = train(section, *caches, stopped)
    assert LEFT in caplog.text
    assert "Resuming" not in caplog.text
    assert sorted(path.name for path in stopped.glob("checkpoints/*/checkpoint-*")) == kept
    assert [point.step for point in read_rows(stopped, "losses.jsonl", LossPoint)] == [
        *range(1, section.max_train_steps + 1)
    ]
    shutil.rmtree(stopped / "checkpoints")
    assert artifact == train(section, *caches, tmp_path / "fresh")
