"""Caching beside SimpleTuner: pictures and captions per CPU second, and bytes a sample.

What starting up costs is taken out on both sides alike: each caches ``COUNT`` samples and, apart, the ``FIRST`` of
them, and the difference counts. SimpleTuner runs as a process, where its two caching calls are timed; ours runs its two
steps here, in turns with the bare encoders. Run ``python -m bench.peers.caching [--sizes tiny,mid] [--rounds 3]``.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from bench.cache_encoding import caption
from bench.measure import alternate, report, table
from bench.peers.training import PAGE
from bench.peers.workload import BATCH, Ours, Theirs, Work, folder_size
from kubetuner.cli.step import run_step
from kubetuner.config.sections.steps import CacheTextSection
from kubetuner.families import load_family
from kubetuner.families.text_encoding import encode_texts
from pipelines.recipes.demo.models import FAMILIES, Size

COUNT, FIRST = 256, 32
KINDS = {
    "cache_vae": "VAECache.process_buckets",
    "cache_text_embeds": "TextEmbeddingCache.compute_embeddings_for_prompts",
}
NAMES = {"cache_vae": "pictures", "cache_text_embeds": "captions"}
CPU = torch.device("cpu")


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="tiny,mid")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for size in (size for size in get_args(Size) if size in arguments.sizes.split(",")):
        compare(size, arguments.families.split(","), arguments.rounds)


def compare(size: Size, families: Sequence[str], rounds: int) -> None:
    """Write the table of one size."""
    rows, loads = [], []
    for family in families:
        with tempfile.TemporaryDirectory() as scratch:
            rows += measure(Work(family, "full"), size, rounds, Path(scratch))
        loads.append(os.getloadavg()[1])
        print(*rows[-2:], f"load {loads[-1]:.1f}", sep="\n", flush=True)
    head = [
        "family", "what", "floor", "SimpleTuner", "kubetuner", "ours is faster by", "share of the floor",
        "bytes a sample, SimpleTuner", "bytes, kubetuner", "ours / SimpleTuner",
    ]  # fmt: skip
    note = (
        f"\n\nA CPU second, float32, {COUNT - FIRST} samples, {rounds} rounds, medians; the machine's load was "
        f"{min(loads):.0f} to {max(loads):.0f}. Bytes are of all files of a cache."
    )
    report(f"Caching, {size} models", table(head, rows) + note, PAGE)


def measure(work: Work, size: Size, rounds: int, scratch: Path) -> list[list[str]]:
    """Two rows of the table."""
    their_seconds, their_bytes = theirs_caches(work, size, rounds, scratch)
    our_seconds, our_bytes = ours_caches(work, size, rounds, scratch)
    rows = []
    for kind, name in NAMES.items():
        theirs, ours = ((COUNT - FIRST) / seconds[kind] for seconds in (their_seconds, our_seconds))
        floor = COUNT / our_seconds[f"bare {kind}"]
        rows.append(
            [
                work.family,
                name,
                f"{floor:,.0f}",
                f"{theirs:,.0f}",
                f"{ours:,.0f}",
                f"{ours / theirs:.1f}",
                f"{ours / floor:.0%}",
                f"{their_bytes[kind]:,}",
                f"{our_bytes[kind]:,}",
                f"{our_bytes[kind] / their_bytes[kind]:.2f}",
            ]
        )
    return rows


def theirs_caches(work: Work, size: Size, rounds: int, scratch: Path) -> tuple[dict[str, float], dict[str, int]]:
    """CPU seconds of SimpleTuner for the samples after the first, and its bytes a sample."""
    whole = Theirs.prepare(work, size, COUNT, scratch / "theirs")
    start = Theirs.prepare(work, size, FIRST, scratch / "theirs-first")
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        taken = []
        for side in (whole, start):
            side.forget()
            taken.append(side.train(1).calls)
        for kind, call in KINDS.items():
            seconds[kind].append(sum(taken[0][call]) - sum(taken[1][call]))
    size_of = dict(zip(KINDS, (size // COUNT for size in whole.cached_bytes()), strict=True))
    return {kind: statistics.median(values) for kind, values in seconds.items()}, size_of


def ours_caches(work: Work, size: Size, rounds: int, scratch: Path) -> tuple[dict[str, float], dict[str, int]]:
    """The same of our steps; and of the bare encoders for all samples."""
    sides = {
        "whole": Ours.prepare(work, size, COUNT, scratch / "ours"),
        "start": Ours.prepare(work, size, FIRST, scratch / "ours-first"),
    }
    for side in sides.values():
        side.plan(1)
    works = bare_encoders(sides["whole"])
    works |= {f"{kind} {name}": partial(run_cache, kind, side.folder) for kind in KINDS for name, side in sides.items()}
    alternate(1, works)
    seconds = {name: spent.cpu for name, spent in alternate(rounds, works).items()}
    for kind in KINDS:
        seconds[kind] = seconds[f"{kind} whole"] - seconds[f"{kind} start"]
    return seconds, {kind: folder_size(sides["whole"].folder / kind) // COUNT for kind in KINDS}


def run_cache(kind: str, folder: Path) -> None:
    """Run one of our steps on an empty folder."""
    out = folder / kind
    shutil.rmtree(out, ignore_errors=True)
    run_step(kind, folder / "plan/sections.json", [f"dataset={folder / 'download_dataset'}"], out)


def bare_encoders(side: Ours) -> dict[str, Callable[[], object]]:
    """Calls that do nothing but encode all samples, as the planned ``side`` would."""
    sections = json.loads((side.folder / "plan/sections.json").read_text(encoding="utf-8"))
    section = CacheTextSection.model_validate_json(json.dumps(sections["cache_text_embeds"]))
    family, edge = load_family(section.model.family), side.work.edge
    vae, encoders = family.load_vae(section.model, CPU), family.load_text_encoders(section.model, CPU)
    pixels = torch.randn(BATCH, 3, edge, edge)
    noise = torch.randn(BATCH, *family.latent_shape(vae, edge, edge))
    texts = sorted(caption(index) for index in range(COUNT))

    @torch.inference_mode()
    def pictures() -> None:
        for _ in range(COUNT // BATCH):
            family.encode_pixels(vae, pixels, noise)

    @torch.inference_mode()
    def captions() -> None:
        encode_texts(family, encoders, texts, section)

    return {"bare cache_vae": pictures, "bare cache_text_embeds": captions}


if __name__ == "__main__":
    main()
