"""The compiled pipeline: its shape, its rules, and that the committed file is current."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "pipelines" / "compiled" / "finetune.yaml"
HEAVY = ("torch", "diffusers", "transformers", "mlflow", "peft", "accelerate")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> str:
    target = tmp_path_factory.mktemp("compiled") / "finetune.yaml"
    code = (
        "import sys; from pathlib import Path; from pipelines.compile import compile_pipeline; "
        f"compile_pipeline(Path({str(target)!r})); print([n for n in {HEAVY!r} if n in sys.modules])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KUBETUNER_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip().splitlines()[-1] == "[]", "compiling loaded a heavy library"
    return target.read_text()


def _documents(text: str) -> list[dict]:
    documents = list(yaml.safe_load_all(text))
    documents[0].pop("sdkVersion")
    return documents


def test_the_committed_file_is_current(compiled):
    assert _documents(COMMITTED.read_text()) == _documents(compiled), "run `kubetuner compile`"


def test_it_is_a_pipeline_spec_in_ascii_without_a_header(compiled):
    assert compiled.isascii()
    assert not compiled.startswith("#")
    assert "pip install" not in compiled
    assert ":latest" not in compiled
    json_format.ParseDict(yaml.safe_load(compiled), pipeline_spec_pb2.PipelineSpec())


def test_the_steps_and_what_is_cached(compiled):
    spec = yaml.safe_load(compiled)
    tasks = spec["root"]["dag"]["tasks"]
    names = {
        "plan",
        "download-dataset",
        "split",
        "split-2",
        "for-loop-1",
        "for-loop-2",
        "train",
        "evaluate",
        "push-to-hub",
    }
    assert set(tasks) == names
    assert {name for name, task in tasks.items() if not task.get("cachingOptions", {}).get("enableCache")} == {
        "plan", "push-to-hub", "for-loop-1", "for-loop-2",
    }  # fmt: skip
    assert not set(tasks["for-loop-1"]["dependentTasks"]) & {"for-loop-2"}
    assert not set(tasks["for-loop-2"]["dependentTasks"]) & {"for-loop-1"}
    assert set(spec["root"]["inputDefinitions"]["parameters"]) == {"config", "data_backend_config", "num_shards"}


def test_models_get_a_gpu(compiled):
    executors = yaml.safe_load(compiled)["deploymentSpec"]["executors"]
    gpus = {
        name.removeprefix("exec-")
        for name, executor in executors.items()
        if executor["container"].get("resources", {}).get("accelerator", {}).get("resourceType") == "nvidia.com/gpu"
    }
    assert gpus == {"cache-vae", "cache-text-embeds", "train", "evaluate"}
