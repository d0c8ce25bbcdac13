"""The cache steps beside a bare loop over the encoder, for tiny models; and what the data steps hold in memory.

The bare loop calls the family's encoder on batches that are ready and throws the results away: no reading, decoding,
keys, shards or rows. With models this small everything around them shows; with real ones it disappears.

Run ``PYTHONPATH=src:. python -m bench.cache_encoding [--pictures 256] [--captions 1024] [--memory 1000,10000]``.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("KUBETUNER_STORE", None)

import argparse
import logging
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.measure import alternate, in_child, peak_memory, report, table
from kubetuner.config.sections import (
    CacheTextSection,
    CacheVaeSection,
    DatasetGeometry,
    Geometry,
    ModelRef,
)
from kubetuner.config.source_sections import DatasetSource, DownloadSection
from kubetuner.families import load_family
from kubetuner.steps.cache_text_embeds import BATCHES_AT_ONCE, cache_text_embeds
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.steps.download_dataset import download_dataset
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

FAMILIES = ("pixart_sigma", "sdxl", "sana")
CPU = torch.device("cpu")
BATCH = 16
PICTURES = 4
FIRST = 16


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--captions", type=int, default=1024)
    parser.add_argument("--edge", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="1000,10000")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        make_dataset(Path(scratch) / "cache_vae", arguments.pictures, arguments.edge)
        make_dataset(Path(scratch) / "cache_text_embeds", arguments.captions, 64)
        make_dataset(Path(scratch) / "start", FIRST, arguments.edge)
        for family in FAMILIES:
            write_pipeline(build_pipeline(family, "unit"), Path(scratch) / family)
            counts = {"cache_vae": arguments.pictures, "cache_text_embeds": arguments.captions}
            rows += throughput(Path(scratch), family, counts, arguments.edge, arguments.rounds)
    head = ["family", "what", "bare loop, a CPU second", "our step, a CPU second", "share of the bare loop"]
    note = (
        f"\n\nUnit models, {arguments.pictures} pictures of {arguments.edge} px, {arguments.captions} captions. "
        "Loading the models is not counted on either side; ours reads, decodes and checks PNGs, and writes checksummed "
        "shards and rows. Batches of 4 pictures or 16 texts on both sides. CPU time, "
        "medians of alternating rounds."
    )
    report("Cache: encoding", table(head, rows) + note)
    memory = []
    for count in (int(text) for text in arguments.memory.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            peaks = [
                in_child("bench.cache_encoding", f"step_memory({step!r}, Path({scratch!r}), {count})").split()[0]
                for step in ("none", "download_dataset", "cache_vae", "cache_text_embeds", "reuse")
            ]
        memory.append([f"{count:,}", *peaks])
    head = ["samples", "imports alone", "download_dataset", "cache_vae", "cache_text_embeds", "cache_vae, all reused"]
    report(
        "Cache: peak memory of the data steps",
        table(head, memory) + "\n\nPeak resident MB of a fresh process, one run each; SDXL.",
    )


def throughput(scratch: Path, name: str, counts: dict[str, int], edge: int, rounds: int) -> list[list[str]]:
    """Two rows of the table."""
    ref = ModelRef.model_validate({"family": name, "path": str(scratch / name)})
    family = load_family(ref.family)
    vae, encoders = family.load_vae(ref, CPU), family.load_text_encoders(ref, CPU)
    pixels = torch.randn(PICTURES, 3, edge, edge)
    noise = torch.randn(PICTURES, *family.latent_shape(vae, edge, edge))
    texts = sorted(caption(index) for index in range(counts["cache_text_embeds"]))
    section = CacheTextSection(model=ref, text_encoder_batch_size=BATCH)

    @torch.inference_mode()
    def bare_vae() -> None:
        for _ in range(counts["cache_vae"] // PICTURES):
            family.encode_pixels(vae, pixels, noise)

    @torch.inference_mode()
    def bare_text() -> None:
        for start in range(0, len(texts), BATCHES_AT_ONCE * BATCH):
            family.encode_texts(encoders, texts[start : start + BATCHES_AT_ONCE * BATCH], section)

    def step(kind: str, dataset: str) -> None:
        shutil.rmtree(scratch / "out", ignore_errors=True)
        run_step(kind, ref, scratch / dataset, scratch / "out")

    works: dict[str, Any] = {"bare cache_vae": bare_vae, "bare cache_text_embeds": bare_text}
    for kind in counts:
        works |= {f"{kind} whole": partial(step, kind, kind), f"{kind} start": partial(step, kind, "start")}
    alternate(1, works)
    seconds = alternate(rounds, works)
    rows = []
    for kind, what in (("cache_vae", "pictures"), ("cache_text_embeds", "texts")):
        # The step on a few samples is loading and little else.
        ours = (counts[kind] - FIRST) / (seconds[f"{kind} whole"] - seconds[f"{kind} start"])
        bare = counts[kind] / seconds[f"bare {kind}"]
        rows.append([name, what, f"{bare:,.0f}", f"{ours:,.0f}", f"{ours / bare:.0%}"])
    return rows


def run_step(kind: str, ref: ModelRef, dataset: Path, out: Path, edge: int) -> None:
    """Run one cache step; pictures are ``edge`` pixels wide and high."""
    if kind == "cache_vae":
        geometry = Geometry(
            resolution=edge, resolution_type="pixel", aspect_bucket_alignment=8, crop=True, crop_style="center"
        )
        datasets = (DatasetGeometry(id="bench", geometry=geometry),)
        cache_vae(CacheVaeSection(model=ref, datasets=datasets, dtype="bf16", vae_batch_size=PICTURES), dataset, out)
    else:
        cache_text_embeds(CacheTextSection(model=ref, text_encoder_batch_size=BATCH, dtype="bf16"), dataset, out)


def make_dataset(folder: Path, count: int, edge: int) -> None:
    """A dataset artifact of ``count`` different pictures."""
    make_pictures(folder, count, edge)
    download(folder)


def make_pictures(folder: Path, count: int, edge: int) -> None:
    """Noise that is quick to draw: one large picture, cut at different places."""
    pictures = folder.parent / f"{folder.name}-pictures"
    pictures.mkdir(parents=True)
    large = Image.effect_noise((edge + 400, edge + 400), 60).convert("RGB")
    for index in range(count):
        left, top = index % 400, index // 400
        large.crop((left, top, left + edge, top + edge)).save(pictures / f"{caption(index)}.png", compress_level=1)


def download(folder: Path) -> None:
    """The step that makes the dataset artifact."""
    source = DatasetSource(id="bench", instance_data_dir=str(folder.parent / f"{folder.name}-pictures"))
    download_dataset(DownloadSection(datasets=(source,)), folder)


def caption(index: int) -> str:
    """About a dozen words."""
    return f"a picture number {index} with {index % 7} red rings on a white background and little else"


def step_memory(step: str, scratch: Path, count: int) -> None:
    """Run one data step on ``count`` samples, after those before it, and print the memory."""
    torch.set_num_threads(1)
    dataset, base = scratch / "dataset", scratch / "base"
    ref = ModelRef(family="sdxl", path=str(base))
    if step == "none":
        make_pictures(dataset, count, 32)
        write_pipeline(build_pipeline("sdxl", "unit"), base)
    elif step == "download_dataset":
        download(dataset)
    else:
        run_step("cache_text_embeds" if step == "cache_text_embeds" else "cache_vae", ref, dataset, scratch / "store")
    print(peak_memory())


if __name__ == "__main__":
    main()
