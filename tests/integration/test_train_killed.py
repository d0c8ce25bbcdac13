"""``kubetuner step train``, killed ten times at random moments, beside one that nobody touched."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kubetuner.artifacts import ModelArtifact, read_artifact, read_rows, verify_files
from kubetuner.cli.main import cli
from kubetuner.training.checkpoints import LossPoint
from pipelines.recipes.demo.models import build_pipeline, write_pipeline
from tests.prepared import train_arguments
from tests.unit.conftest import fork, wait

KILLS, STEPS, INTERVAL = 10, 40, 2
CONFIG: dict[str, Any] = {
    "model_type": "lora", "model_family": "sana", "pretrained_model_name_or_path": "base", "lora_rank": 2,
    "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": STEPS, "learning_rate": 1e-2,
    "lr_scheduler": "cosine", "lr_warmup_steps": 15, "use_ema": True, "ema_update_interval": 2, "ema_decay": 0.9,
    "caption_dropout_probability": 0.3, "checkpoint_step_interval": INTERVAL, "checkpoints_total_limit": 2,
    "mixed_precision": "no", "gradient_checkpointing": False, "validation_resolution": 64, "seed": 7,
}  # fmt: skip


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command without ``--out``, over caches of seven pictures in two buckets."""
    for name in ("MLFLOW_TRACKING_URI", "KUBETUNER_STORE", "KUBETUNER_CHECKPOINTS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    write_pipeline(build_pipeline("sana", "unit"), tmp_path / "base")
    (tmp_path / "pictures").mkdir()
    for index in range(7):
        size = (64, 64) if index < 4 else (128, 64)
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / "pictures" / f"picture_{index}.png")
    return train_arguments(tmp_path, CONFIG, "pictures")


def test_ten_kills_change_nothing(arguments: list[str], tmp_path: Path) -> None:
    """Losses, rates, averaged weights: the artifact's checksums and the rows are those of untouched processes."""
    fresh, whole, parts = (tmp_path / name for name in ("fresh", "whole", "parts"))
    alone = subprocess.Popen(
        [sys.executable, "-m", "kubetuner.cli.main", *arguments, "--out", str(fresh)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    command([*arguments, "--out", str(whole)])  # Also imports what the children below then need not.
    moments = random.Random(20)
    for least in sorted(moments.sample(range(STEPS * 3 // 4), KILLS)):
        child = fork(lambda: command([*arguments, "--out", str(parts)]))
        _await_checkpoint(parts, least)
        time.sleep(moments.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL, "it ended before it could be killed"
        assert not (parts / "artifact.json").exists()

    assert wait(fork(lambda: command([*arguments, "--out", str(parts)]))) == 0

    assert alone.wait(120) == 0
    assert read_artifact(parts, ModelArtifact) == read_artifact(whole, ModelArtifact)
    assert read_artifact(fresh, ModelArtifact) == read_artifact(whole, ModelArtifact)
    verify_files(parts, read_artifact(parts, ModelArtifact))
    points = list(read_rows(parts, "losses.jsonl", LossPoint))
    assert [point.step for point in points] == list(range(1, STEPS + 1))
    assert (parts / "losses.jsonl").read_bytes() == (whole / "losses.jsonl").read_bytes()
    assert len({point.loss for point in points}) == STEPS
    assert not (parts / "checkpoints").exists()


def command(arguments: list[str]) -> None:
    """``kubetuner`` in this process, where torch is imported already."""
    cli.main(args=arguments, standalone_mode=False)


def _await_checkpoint(out: Path, least: int) -> None:
    """Until a checkpoint of at least ``least`` steps is there, complete or about to be; at once for 0 steps."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        steps = [int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoints/*/checkpoint-*")]
        if max(steps, default=0) >= least:
            return
        time.sleep(0.002)
    raise AssertionError(f"no checkpoint of step {least} after a minute")
