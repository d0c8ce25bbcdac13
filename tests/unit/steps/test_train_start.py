"""What a process does before its first step, in modules and collections: seconds differ from machine to machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kubetuner.config.sections.steps import ModelRef
from tests.prepared import train_arguments
from tests.unit.steps.conftest import pictures

PROBE = """
import gc, json, os, sys
collections = []

def note(phase, about):
    if phase == "stop" and about["generation"] == 2:
        collections.append(len(sys.modules))

gc.callbacks.append(note)
from kubetuner.imports import importing
with importing():
    from torch.optim.optimizer import register_optimizer_step_post_hook
from kubetuner.cli.main import main

def tell(*_):
    found = {"modules": list(sys.modules), "collections": collections, "frozen": gc.get_freeze_count()}
    with open(sys.argv[1], "w") as stream:
        json.dump(found, stream)
    os._exit(0)

register_optimizer_step_post_hook(tell)
main(sys.argv[2:])
"""
# Of other steps, of tracking, or of the parts of a pipeline that are not trained. (accelerate imports boto3 itself.)
NEEDLESS = (
    "bs4", "ftfy", "google.cloud", "kfp", "mlflow", "pandas", "pyarrow", "rapidfuzz", "sklearn", "torchvision",
    "diffusers.pipelines", "kubetuner.config.build", "kubetuner.config.load", "kubetuner.evaluation",
    "kubetuner.publishing", "kubetuner.steps.plan", "kubetuner.store.bucket", "kubetuner.trainjob",
    "transformers.models.clip", "transformers.models.gemma2", "transformers.models.t5",
)  # fmt: skip


@pytest.mark.usefixtures("no_store")
def test_the_first_step_waits_for_nothing_that_it_does_not_need(
    tmp_path: Path, bases: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "KUBETUNER_CHECKPOINTS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    found = _first_step(_prepared(tmp_path, bases["sana"].path))

    modules, collections = found["modules"], found["collections"]
    assert [name for name in NEEDLESS if name in modules] == []
    ours = [name for name in modules if name.partition(".")[0] == "kubetuner"]
    assert len(ours) < 130
    # The collector walks through what our own modules made, and never through torch's and diffusers' objects.
    assert found["frozen"] > 200_000
    assert [count for count in collections if count > 1000] == []


def _prepared(folder: Path, base: str) -> list[str]:
    """The command, over caches of four pictures."""
    for name, content in pictures("a", 4).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    config = {
        "model_type": "full", "model_family": "sana", "pretrained_model_name_or_path": base, "max_train_steps": 1,
        "train_batch_size": 2, "mixed_precision": "no", "lr_warmup_steps": 0, "validation_resolution": 64,
    }  # fmt: skip
    return [*train_arguments(folder, config, "a"), "--out", f"{folder}/out"]


def _first_step(arguments: list[str]) -> dict[str, list[str] | list[int] | int]:
    """When the first step is done: modules, how many there were at each full collection, and frozen objects."""
    told = Path(arguments[-1]).with_name("told.json")
    command = [sys.executable, "-c", PROBE, str(told), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(told.read_text())  # type: ignore[no-any-return]
