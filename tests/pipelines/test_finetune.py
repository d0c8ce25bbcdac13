"""The compiled pipeline: its shape, its rules, and that the committed file is current."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from kubetuner.config.trainjob import TrainJobSettings

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "pipelines" / "compiled" / "finetune.yaml"
HEAVY = ("torch", "diffusers", "transformers", "mlflow", "peft", "accelerate")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> str:
    return _compile(tmp_path_factory.mktemp("compiled") / "finetune.yaml", {})


def _compile(target: Path, settings: dict[str, str]) -> str:
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
        env=environment | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"} | settings,
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


def test_nodes_of_a_trainjob_have_the_gpus_and_share_a_volume(tmp_path):
    settings = {"KUBETUNER_TRAINJOB": '{"workspace_pvc": "shared", "mount": "/shared"}', "KUBETUNER_GPUS": "8"}
    spec, platform = _documents(_compile(tmp_path / "finetune.yaml", settings))

    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    told = {}
    for name, executor in spec["deploymentSpec"]["executors"].items():
        environment = {one["name"]: one["value"] for one in executor["container"].get("env", ())}
        if "KUBETUNER_TRAINJOB" in environment:
            told[name] = TrainJobSettings.from_json(environment["KUBETUNER_TRAINJOB"])
    assert set(told) == {"exec-plan", "exec-train"}
    assert (told["exec-train"].gpus, told["exec-train"].image) == (8, "ghcr.io/kubetuner/kubetuner-train:0.1.0")
    assert "resources" not in spec["deploymentSpec"]["executors"]["exec-train"]["container"]
    mounts = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(mounts) == {"exec-train"}
    assert [(one["constant"], one["mountPath"]) for one in mounts["exec-train"]["pvcMount"]] == [("shared", "/shared")]
