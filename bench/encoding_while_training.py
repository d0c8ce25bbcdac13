"""What encoding while training costs: steps of ``train`` with ``vae_cache_disable`` beside steps on cached latents.

Both run the step itself on the demo's bases and random pictures, no picture twice. Its CPU time for many steps less
that for few, over the difference, is a step without loading and saving; rounds take turns. One thread, which is the
worst case: nothing overlaps. On a GPU decoding and encoding overlap with the step.

Run ``PYTHONPATH=src:. python -m bench.encoding_while_training [--rounds 3]``.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import argparse
import json
import logging
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.measure import alternate, report, table
from kubetuner.config.sections.steps import Sections
from kubetuner.steps.cache_text_embeds import cache_text_embeds
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from kubetuner.steps.train import train

FAMILIES = ("pixart_sigma", "sdxl", "sana")
DEMO = Path("pipelines/recipes/demo")
EDGE, BATCH = 64, 8
FEW, MANY = 4, 28


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    rows = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(measure(family, Path(scratch), rounds))
    head = ["family", "cached", "made while training", "steps/s of cached"]
    note = (
        f"\n\nCPU milliseconds a step, the demo's settings and bases, {BATCH} pictures of {EDGE} px a step, nothing "
        "recomputed; one thread, so nothing overlaps. The share is what is left of the steps a second. By counted "
        "operations, encoding adds 25 % to a full step of PixArt Sigma, 34 % to a LoRA step of SDXL and 58 % to a full "
        "step of Sana at 1024 px, before anything overlaps."
    )
    report("Training: what encoding meanwhile costs", table(head, rows) + note)


def measure(family: str, scratch: Path, rounds: int) -> list[str]:
    """One line of the table."""
    os.environ["KUBETUNER_STORE"] = str(scratch / "store")
    (scratch / "pictures").mkdir()
    for number in range(BATCH * MANY):
        noise = np.random.default_rng(number).integers(0, 256, (EDGE, EDGE, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((2 * EDGE, 2 * EDGE)).save(scratch / "pictures" / f"{number}.png")
    modes = {"cached": False, "made": True}
    ready = {name: prepare(family, scratch, name, disabled) for name, disabled in modes.items()}
    works = {
        f"{name}{steps}": partial(run, ready[name], scratch / name, steps) for name in modes for steps in (FEW, MANY)
    }
    times = alternate(rounds, works)
    cached, made = ((times[f"{name}{MANY}"].cpu - times[f"{name}{FEW}"].cpu) / (MANY - FEW) for name in modes)
    return [family, f"{1000 * cached:.1f}", f"{1000 * made:.1f}", f"{cached / made:.2f}"]


def prepare(family: str, scratch: Path, name: str, disabled: bool) -> Sections:
    """The steps before ``train``."""
    config = json.loads((DEMO / f"{family}.json").read_text(encoding="utf-8"))
    config |= {"train_batch_size": BATCH, "vae_batch_size": BATCH, "lr_warmup_steps": 0, "max_train_steps": MANY}
    config |= {"vae_cache_disable": disabled}
    data = [
        {
            "id": "a", "type": "local", "instance_data_dir": str(scratch / "pictures"), "caption_strategy": "filename",
            "resolution": EDGE, "resolution_type": "pixel", "crop": False,
        }
    ]  # fmt: skip
    sections = make_plan(config, data, cwd=Path.cwd()).sections
    download_dataset(sections.download, scratch / name / "dataset")
    cache_vae(sections.cache_vae, scratch / name / "dataset", scratch / name / "latents")
    cache_text_embeds(sections.cache_text_embeds, scratch / name / "dataset", scratch / name / "texts")
    return sections


def run(sections: Sections, folder: Path, steps: int) -> None:
    """Train anew for so many steps."""
    section = sections.train.model_copy(update={"max_train_steps": steps, "resume_from_checkpoint": ""})
    out = folder / f"model-{steps}-{time.monotonic_ns()}"
    train(section, [folder / "latents"], [folder / "texts"], out, dataset=folder / "dataset")


if __name__ == "__main__":
    main()
