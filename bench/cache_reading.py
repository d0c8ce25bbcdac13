"""Our cache beside the layout of SimpleTuner: bytes, files, random reads; and what batches hold in memory.

SimpleTuner keeps one ``.pt`` per latent and one per caption, gzipped unless ``compress_disk_cache`` is off: the padded
embedding and its mask (reference: simpletuner-behaviour.md, 4.1 and 4.2). Both sides hold bfloat16 random numbers here,
which compress badly; with ``t5_padding: zero`` gzip would take most of the padding away.

Run ``PYTHONPATH=src:. python -m bench.cache_reading [--samples 10000] [--width 64] [--memory 1000,10000]``.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import gzip
import hashlib
import io
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.measure import alternate, in_child, peak_memory, report, table
from bench.synthetic_cache import captions, write_latents, write_texts
from kubetuner.artifacts import LatentRow, LatentsArtifact, TextEmbedsArtifact, TextRow, read_artifact, read_rows
from kubetuner.config.sections.steps import DatasetSampling, ModelRef, TrainSection
from kubetuner.data.batches import Batches
from kubetuner.data.shards import ShardReader
from kubetuner.store import Store

TOKENS = 300
LATENT = (4, 16, 16)
READS = 1000


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", default="1000,10000")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        layout = side_by_side(Path(scratch), arguments.samples, arguments.width, arguments.rounds)
    report("Cache: layout and reading", layout)
    rows = []
    for count in (int(text) for text in arguments.memory.split(",")):
        before, opened, read = (
            in_child("bench.cache_reading", f"batches_memory({count}, {step})").split()[1] for step in range(3)
        )
        rows.append([f"{count:,}", before, opened, read])
    head = ["samples", "imports", "opened", "one epoch read"]
    note = (
        "\n\nResident MB without mapped files, which the page cache may take back; one run each. At most 256 are "
        "samples kept ready."
    )
    report("Cache: memory of batches", table(head, rows) + note)


def side_by_side(scratch: Path, count: int, width: int, rounds: int) -> str:
    """The table of both layouts."""
    ours, theirs = scratch / "ours", scratch / "theirs"
    write_latents(ours / "latents", count, LATENT)
    write_texts(ours / "texts", count, width)
    write_single_files(theirs / "gzip", count, width, gzip.compress)
    write_single_files(theirs / "plain", count, width, bytes)
    order = random.Random(0)
    rows = []
    opening: dict[str, float] = {}
    for kind in ("latents", "texts"):
        picks = [order.randrange(count) for _ in range(READS)]
        started = time.process_time()
        opened_ours = open_ours(ours / kind)
        opening[kind] = time.process_time() - started
        seconds = alternate(
            rounds,
            {
                "ours": partial(opened_ours.read, picks),
                "gzip": partial(read_single, theirs / "gzip" / kind, picks, gzip.decompress),
                "plain": partial(read_single, theirs / "plain" / kind, picks, bytes),
            },
        )
        for name, folder in (
            ("ours", ours / kind),
            ("gzip", theirs / "gzip" / kind),
            ("plain", theirs / "plain" / kind),
        ):
            sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
            layout = "shards" if name == "ours" else f"one .pt each, {name}"
            per, rate = sum(sizes) / count, READS / seconds[name].cpu
            ratio = f"{seconds[name].cpu / seconds['ours'].cpu:.1f}"
            rows.append([kind, layout, f"{len(sizes):,}", f"{per:,.0f}", f"{rate:,.0f}", ratio])
    first = sum(row_bytes(ours / kind) for kind in ("latents", "texts")) / count
    head = ["what", "layout", "files", "bytes each", "reads per CPU second", "our reads are faster by"]
    spent = ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in opening.items())
    note = (
        f"\n\n{count:,} samples, bfloat16; latents {LATENT}; captions of 40 tokens on average beside {TOKENS} padded "
        f"ones, width {width}. Our bytes include rows and index ({first:,.0f} a sample). Every read ends in "
        f"float32, as in training: ours is a view of the mapped file before that. "
        "Files are in the page cache. CPU time, medians of alternating rounds. "
        f"Opening ours, with the checksum of every shard, takes once: {spent}."
    )
    return table(head, rows) + note


def write_single_files(folder: Path, count: int, width: int, pack: Callable[[bytes], bytes]) -> None:
    """One file per latent and per caption."""
    for kind in ("latents", "texts"):
        (folder / kind).mkdir(parents=True)
    for index, (_, tokens) in enumerate(captions(count)):
        _save(folder / "latents" / _name("latents", index), torch.randn(LATENT).bfloat16(), pack)
        mask = (torch.arange(TOKENS) < tokens).long()
        named = {"prompt_embeds": torch.randn(1, TOKENS, width).bfloat16(), "attention_mask": mask}
        _save(folder / "texts" / _name("texts", index), named, pack)


@dataclass(frozen=True)
class Ours:
    """An open cache of ours: where each sample is, and its reader."""

    reader: ShardReader
    places: list[tuple[str, str]]
    name: str

    def read(self, picks: list[int]) -> None:
        """Read the samples ``picks`` as training does."""
        for pick in picks:
            key, shard = self.places[pick]
            self.reader.tensors(key, shard, (self.name,))[self.name].float()


def open_ours(folder: Path) -> Ours:
    """Open a cache and read something of each shard, so that all are hashed."""
    if folder.name == "latents":
        reader, name = opened(folder, read_artifact(folder, LatentsArtifact)), "latents"
        places = [(row.key, row.shard) for row in read_rows(folder, "latents.jsonl", LatentRow)]
    else:
        reader, name = opened(folder, read_artifact(folder, TextEmbedsArtifact)), "embeds"
        places = [(row.key, row.shard) for row in read_rows(folder, "texts.jsonl", TextRow)]
    ours = Ours(reader, places, name)
    ours.read(list(range(0, len(places), 100)))
    return ours


def opened(folder: Path, artifact: LatentsArtifact | TextEmbedsArtifact) -> ShardReader:
    """A reader of the artifact's shards."""
    reader = ShardReader(Store(folder))
    reader.verify(artifact.shards)
    return reader


def read_single(folder: Path, picks: list[int], unpack: Callable[[bytes], bytes]) -> None:
    """Read the files of ``picks``."""
    for pick in picks:
        content = unpack((folder / _name(folder.name, pick)).read_bytes())
        loaded = torch.load(io.BytesIO(content), weights_only=True)
        (loaded if isinstance(loaded, torch.Tensor) else loaded["prompt_embeds"]).float()


def row_bytes(folder: Path) -> int:
    """Bytes of a cache that are not shards."""
    return sum(path.stat().st_size for path in folder.rglob("*.json*"))


def batches_memory(count: int, step: int) -> None:
    """Print the memory after imports (``step`` 0), with batches opened (1) and after an epoch (2)."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        in_child("bench.cache_reading", f"write_both(Path({scratch!r}), {count})")
        section = TrainSection(
            model=ModelRef(family="pixart_sigma", path="none"), model_type="full", max_train_steps=1,
            datasets=(DatasetSampling(id="bench"),),
        )  # fmt: skip
        if step > 0:
            batches = Batches(section, [folder / "latents"], [folder / "texts"], ("embeds",))
            for position in range(batches.batches_per_epoch if step > 1 else 0):
                batches.batch(position, 0)
        print(peak_memory())


def write_both(folder: Path, count: int) -> None:
    """A small cache of ``count`` samples."""
    write_latents(folder / "latents", count, (4, 8, 8))
    write_texts(folder / "texts", count, 16)
    print("done")


def _name(kind: str, index: int) -> str:
    return hashlib.md5(f"{kind}{index}".encode(), usedforsecurity=False).hexdigest() + ".pt"


def _save(path: Path, value: object, pack: Callable[[bytes], bytes]) -> None:
    stream = io.BytesIO()
    torch.save(value, stream)
    path.write_bytes(pack(stream.getvalue()))


if __name__ == "__main__":
    main()
