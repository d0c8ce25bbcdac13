"""The demo as a newcomer runs it: what the base could not draw, the trained model draws, and nothing is forgotten."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipelines.recipes.demo.scoring import score_picture

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_demo_teaches_a_ring_and_keeps_the_old_shapes(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("kubetuner")), "run", "--config", "pipelines/recipes/demo/sana.json"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "KUBETUNER_"))}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    summary = json.loads((tmp_path / "summary.json").read_text())
    exact = {moment: {} for moment in ("before", "after")}
    for image in summary["images"]:
        for moment, found in exact.items():
            with Image.open(image[moment]) as picture:
                found[image["prompt"]] = score_picture(picture.convert("RGB"), image["prompt"]).exact
    rings = [prompt for prompt in exact["before"] if "ring" in prompt]
    old = [prompt for prompt in exact["before"] if "ring" not in prompt]
    assert not any(exact["before"][prompt] for prompt in rings)
    assert all(exact["before"][prompt] for prompt in old)
    assert sum(exact["after"].values()) >= len(exact["after"]) - 1
    assert summary["eval_loss"]["after"] < 0.6 * summary["eval_loss"]["before"]
    assert summary["train_loss"]["last"] < summary["train_loss"]["first"]
    report = (tmp_path / "report.html").read_text()
    assert report.count("Could not draw it before, can now") >= len(rings) - 1
    assert report.count("Could draw it before, still can") >= len(old) - 1
