"""What crosses between a step and Kubeflow."""

import json
import math

from kubetuner.artifacts import ModelArtifact
from kubetuner.steps.boundary import facts, whole_numbers, write_metrics


def test_facts_are_finite_scalars():
    artifact = ModelArtifact(
        fingerprint="f", parents=("p",), family="sdxl", model_type="lora", base_model="b", base_revision="",
        steps=3, first_loss=0.5, last_loss=math.nan,
    )  # fmt: skip
    found = facts(artifact)
    assert found["steps"] == 3
    assert found["first_loss"] == 0.5
    assert "last_loss" not in found
    assert "parents" not in found
    assert "files" not in found


def test_metrics_are_finite_and_leave_a_file(tmp_path):
    metadata: dict[str, object] = {}
    write_metrics(metadata, tmp_path / "a" / "metrics", {"loss": 1, "bad": math.inf, "none": None})
    assert metadata == {"loss": 1.0}
    assert json.loads((tmp_path / "a" / "metrics").read_text()) == {"loss": 1.0}


def test_whole_numbers_come_back():
    found = whole_numbers({"a": 64.0, "b": [1.0, {"c": 0.5}], "d": True, "e": "1.0"})
    assert json.dumps(found) == '{"a": 64, "b": [1, {"c": 0.5}], "d": true, "e": "1.0"}'
