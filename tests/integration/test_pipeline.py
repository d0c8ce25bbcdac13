"""The whole pipeline through kfp's local runner: three families, real photographs, stock diffusers at the end."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines.recipes.demo.models import FAMILIES, build_pipeline, write_pipeline

ROOT = Path(__file__).parents[2]
ASPECTS = [(128, 128), (192, 128), (128, 192), (150, 131), (256, 128)]
# When latents are made: by training and kept, by training and not kept, or before it.
MAKING: dict[str, dict[str, object]] = {"sana": {"vae_cache_ondemand": True}, "sdxl": {"vae_cache_disable": True}}
PIPELINE_STEPS = {"plan", "download_dataset", "cache_vae", "cache_text_embeds", "train", "evaluate", "push_to_hub"}


def photographs(folder: Path, count: int, offset: int) -> None:
    """Cut ``count`` pictures of various aspects out of scikit-learn's two photographs."""
    folder.mkdir(parents=True)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for index in range(count):
        width, height = ASPECTS[index % len(ASPECTS)]
        left, top = offset + 9 * index, offset + 7 * index
        cut = photos[index % 2].crop((left, top, left + width, top + height))
        cut.save(folder / f"{'a temple' if index % 2 == 0 else 'a flower'} number {index}.jpg".replace(" ", "_"))


def config_of(family: str, base: Path) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_family": family,
        "model_type": "lora" if family == "sdxl" else "full",
        "pretrained_model_name_or_path": str(base),
        "output_dir": "output",
        "max_train_steps": 6,
        "num_train_epochs": 0,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-4,
        "mixed_precision": "no",
        "seed": 7,
        "validation_resolution": "64x128",
        "validation_prompt": "a temple number 1",
        "validation_disable_unconditional": True,
        "validation_num_inference_steps": 2,
        "num_eval_images": 2,
        "eval_timesteps": 4,
        "report_to": "mlflow",
        "tracker_project_name": "photographs",
        "tracker_run_name": "weekly",
    }
    return config


def dataset(name: str, folder: Path, **more: object) -> dict[str, object]:
    return {
        "id": name,
        "type": "local",
        "instance_data_dir": str(folder),
        "caption_strategy": "filename",
        "metadata_backend": "discovery",
        "resolution": 64,
        "resolution_type": "pixel",
        "cache_dir_vae": f"cache/vae/{name}",
        **more,
    }


def kubetuner(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("kubetuner")), *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "KUBETUNER_"))}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_photographs_become_a_model_that_stock_diffusers_runs(family: str, tmp_path: Path) -> None:
    write_pipeline(build_pipeline(family, "unit"), tmp_path / "base")
    photographs(tmp_path / "photos", 10, offset=0)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"not a picture")
    photographs(tmp_path / "held-out", 4, offset=60)
    config = config_of(family, tmp_path / "base") | MAKING.get(family, {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = [
        dataset("photos", tmp_path / "photos", repeats=3),
        dataset("held-out", tmp_path / "held-out", dataset_type="eval"),
        {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(data))
    out = tmp_path / "output"  # Its output_dir.
    run = ("run", "--config", "config.json", "--data", "data.json")

    first = kubetuner(*run, cwd=tmp_path)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-4000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["family"] == family
    assert summary["steps"] == 6
    assert set(summary["train_loss"]) == {"first", "last"}
    assert summary["eval_loss"]["before"] > 0
    assert summary["eval_loss"]["after"] > 0
    assert summary["mlflow_run_id"]
    assert Path(summary["model_path"]).is_dir()
    assert (out / "report.html").stat().st_size > 1000
    assert (out / "mlflow.db").is_file()
    assert (out / "mlartifacts").is_dir()
    assert any((out / "store/index").glob("latents-*/*.json")) == ("vae_cache_disable" not in config)
    for drawn in (picture[moment] for picture in summary["images"] for moment in ("before", "after")):
        with Image.open(drawn) as image:
            assert image.size == (64, 128)
    assert "report.html" in first.stdout.strip().splitlines()[-1]
    assert tracked_runs(out / "mlflow.db") == [
        ("photographs", name, "FINISHED") for name in sorted({*PIPELINE_STEPS - {"plan"}, "weekly"})
    ]
    draws_with_stock_diffusers(family, tmp_path / "base", Path(summary["pushed_to"]))

    second = kubetuner(*run, cwd=tmp_path)
    assert second.returncode == 0, second.stdout[-4000:] + second.stderr[-4000:]
    repeated = json.loads((out / "summary.json").read_text())
    assert {"download_dataset", "cache_vae", "cache_text_embeds", "train", "evaluate"} <= set(repeated["cache_hits"])
    assert repeated["train_loss"] == summary["train_loss"]


def tracked_runs(database: Path) -> list[tuple[str, str, str]]:
    """(experiment, run, status) of every run."""
    query = (
        "SELECT experiments.name, runs.name, runs.status FROM runs "
        "JOIN experiments ON experiments.experiment_id = runs.experiment_id ORDER BY runs.name"
    )
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def draws_with_stock_diffusers(family: str, base: Path, published: Path) -> None:
    """Load what was pushed the way a stranger would, and draw with it."""
    from diffusers import DiffusionPipeline

    if family == "sdxl":
        pipeline = DiffusionPipeline.from_pretrained(base)
        pipeline.load_lora_weights(published)
        size = {"height": 64, "width": 64}
    else:
        pipeline = DiffusionPipeline.from_pretrained(published)
        size = {"height": 64, "width": 64, "use_resolution_binning": False, "clean_caption": False}
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        image = pipeline("a temple", num_inference_steps=2, **size).images[0]
    assert image.size == (64, 64)


def test_every_problem_is_listed_and_the_exit_code_is_two(tmp_path: Path) -> None:
    config = config_of("sana", tmp_path / "nowhere") | {"learning_rat": 1e-4, "train_batch_size": "four"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "data.json").write_text(json.dumps([dataset("photos", tmp_path / "missing", crop="False")]))
    done = kubetuner("validate", "--config", "config.json", "--data", "data.json", cwd=tmp_path)
    assert done.returncode == 2
    message = done.stdout + done.stderr
    for expected in ("learning_rat", "learning_rate", "train_batch_size", "crop"):
        assert expected in message
    assert "Traceback" not in message
