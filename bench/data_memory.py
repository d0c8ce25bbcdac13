"""Peak memory of the data steps as datasets grow: small pictures, a unit model, a fresh process for every figure.

Run ``PYTHONPATH=src:. python -m bench.data_memory [--samples 1000,10000,100000]``.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("KUBETUNER_STORE", None)

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import torch

from bench.cache_encoding import caption, download, make_pictures, run_step
from bench.measure import in_child, peak_memory, report, table
from kubetuner.config.sections.steps import ModelRef
from kubetuner.steps.plan import make_plan
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

FAMILY = "sana"
EDGE = 16
STEPS = ("none", "plan", "download_dataset", "cache_vae", "cache_text_embeds", "cache_vae again")


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", default="1000,10000,100000")
    counts = [int(text) for text in parser.parse_args().samples.split(",")]
    peaks = [measure(count) for count in counts]
    rows = [[f"{count:,}", *(f"{peak:.0f}" for peak in row)] for count, row in zip(counts, peaks, strict=True)]
    if len(counts) > 1:
        above = [
            (last - first) * 2**20 / (counts[-1] - counts[0]) for first, last in zip(peaks[0], peaks[-1], strict=True)
        ]
        rows.append([f"bytes a sample above {counts[0]:,}", *(f"{each:,.0f}" for each in above)])
    note = (
        f"\n\nPeak resident MB of a fresh process, one run each; {FAMILY}, a unit model, pictures of {EDGE} px whose "
        f"names, {len(caption(0))} bytes long, are their captions. Listings, keys and rows stay on disk. SQLite keeps "
        "1 MB of each table in memory and takes as much to sort; beyond this bound some 10 to 20 bytes a sample grow: "
        "places that are still to be encoded or were found, and where rows are."
    )
    report("Data steps: peak memory", table(["samples", "imports", *STEPS[1:]], rows) + note)


def measure(count: int) -> list[float]:
    """Peak MB of each of :data:`STEPS`."""
    with tempfile.TemporaryDirectory() as scratch:
        peaks = []
        for step in STEPS:
            peaks.append(float(in_child("bench.data_memory", f"run({step!r}, Path({scratch!r}), {count})").split()[0]))
            print(f"{count:,} {step}: {peaks[-1]:.0f} MB", file=sys.stderr)
        return peaks


def run(step: str, scratch: Path, count: int) -> None:
    """Run one data step on ``count`` samples, after those before it, and print the memory."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dataset, base = scratch / "dataset", scratch / "base"
    if step == "none":
        make_pictures(dataset, count, EDGE, EDGE)
        write_pipeline(build_pipeline(FAMILY, "unit"), base)
    elif step == "plan":
        plan(dataset, base)
    elif step == "download_dataset":
        download(dataset)
    else:
        ref = ModelRef.model_validate({"family": FAMILY, "path": str(base)})
        run_step(step.removesuffix(" again"), ref, dataset, scratch / "store", EDGE)
    print(peak_memory())


def plan(dataset: Path, base: Path) -> None:
    """The step that measures every picture."""
    config: dict[str, object] = {
        "model_family": FAMILY, "pretrained_model_name_or_path": str(base), "model_type": "full", "max_train_steps": 1,
        "train_batch_size": 4, "output_dir": "runs", "validation_resolution": "64x64",
    }  # fmt: skip
    data = [
        {
            "id": "bench", "type": "local", "instance_data_dir": str(dataset.parent / f"{dataset.name}-pictures"),
            "caption_strategy": "filename", "resolution": EDGE, "resolution_type": "pixel",
            "aspect_bucket_alignment": 8,
        }
    ]  # fmt: skip
    make_plan(config, data, cwd=dataset.parent)


if __name__ == "__main__":
    main()
