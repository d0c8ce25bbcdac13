"""How much of the cache steps' time is the encoder's, for models as wide as the published.

A call of such a model takes seconds on a CPU, and beside other jobs two runs of the same differ by more than what is
looked for. So one run is taken apart: CPU time inside the models' own forward passes, in loading, and in all the rest,
on every thread. A bare loop over ready batches is the first of these.

Run ``PYTHONPATH=src:. python -m bench.wide_encoding [--families pixart_sigma,sdxl,sana]``.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("KUBETUNER_STORE", None)

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from bench.cache_encoding import BATCH, FAMILIES, SCALES, make_dataset, run_step, write_models
from bench.measure import in_child, report, table
from bench.wide_encoders import cuts
from kubetuner.config.sections.steps import ModelRef
from kubetuner.families import encoding, load_family

SCALE = SCALES["wide"]
COUNTS = {"cache_vae": 2, "cache_text_embeds": BATCH - 1}
NAMES = {"cache_vae": "pictures", "cache_text_embeds": "texts"}
ENCODERS = {"Encoder", "T5EncoderModel", "CLIPTextModel", "CLIPTextModelWithProjection", "Gemma2Model"}


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(FAMILIES))
    rows: list[list[str]] = []
    loads: list[float] = []
    for family in parser.parse_args().families.split(","):
        found = json.loads(in_child("bench.wide_encoding", f"print(json.dumps(shares({family!r})))"))
        loads.append(os.getloadavg()[1])
        print(*found, f"load {loads[-1]:.1f}", sep="\n", file=sys.stderr, flush=True)
        rows += found
    report("Cache: encoding with models of the published width", described(rows, loads))


def described(rows: list[list[str]], loads: list[float]) -> str:
    """The table and what it shows, measured at ``loads`` of the machine."""
    head = ["family", "what", "samples", "CPU s in the encoder", "in all the rest", "the encoder's share"]
    width, height, kind = SCALE.file
    note = (
        "\n\nOne run of each step on an empty store, taken apart; loading is counted nowhere. *The encoder* is the "
        "forward pass of the models alone, for texts on batches that the step has filled up with copies; *the rest* is "
        "all other CPU time of every thread: reading, hashing, decoding, resizing, tokenizing, keys, shards, rows. "
        f"Pictures are {SCALE.edge} px of {kind.upper()} files of {width}x{height}, {SCALE.batch} a batch; texts "
        f"{BATCH} a batch, the empty one included. Models have the published width and random weights: whole "
        f"autoencoders (PixArt Sigma's is SDXL's), {cuts()}; the demo's tokenizers. Whole text encoders have a larger "
        f"share. The machine's load was {min(loads):.0f} to {max(loads):.0f}."
    )
    return table(head, rows) + note


class Clock:
    """CPU seconds in the encoder, which only one thread asks, and in loading, which the library does on several."""

    def __init__(self) -> None:
        self.encoder = self.load = 0.0
        self._depth = 0
        self._since = 0.0

    def enter(self) -> None:
        """A model begins; one within another is a part of it."""
        if not self._depth:
            self._since = time.thread_time()
        self._depth += 1

    def leave(self) -> None:
        """It ends."""
        self._depth -= 1
        if not self._depth:
            self.encoder += time.thread_time() - self._since


def shares(name: str) -> list[list[str]]:
    """The rows of one family."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    kinds = [kind for kind in COUNTS if (name, kind) != ("pixart_sigma", "cache_vae")]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        refs = {
            size: ModelRef.model_validate({"family": name, "path": str(scratch / size)}) for size in ("unit", "wide")
        }
        for size in refs:
            write_models(name, size, scratch / size)
        rows = []
        for kind in kinds:
            make_dataset(scratch / kind, COUNTS[kind], SCALE.file if kind == "cache_vae" else (16, 16, "png"))
            run_step(kind, refs["unit"], scratch / kind, scratch / f"{kind}-unit", SCALE.edge)  # For the imports.
            encoder, rest = taken_apart(kind, refs["wide"], scratch / kind, scratch / f"{kind}-wide")
            count = str(COUNTS[kind] + (kind == "cache_text_embeds"))
            share = f"{encoder / (encoder + rest):.1%}"
            rows.append([name, NAMES[kind], count, f"{encoder:.2f}", f"{rest:.3f}", share])
        return rows


def taken_apart(kind: str, ref: ModelRef, dataset: Path, out: Path) -> tuple[float, float]:
    """CPU seconds of a step in the encoder's forward passes, and in all but these and loading."""
    clock = Clock()
    load_texts = call_timed(type(load_family(ref.family)), "load_text_encoders", clock)
    with forward_timed(clock), call_timed(encoding, "load_encoder", clock), load_texts:
        started = time.process_time()
        run_step(kind, ref, dataset, out, SCALE.edge, SCALE.batch)
        whole = time.process_time() - started
    return clock.encoder, whole - clock.encoder - clock.load


@contextmanager
def forward_timed(clock: Clock) -> Iterator[None]:
    """Time the forward passes of :data:`ENCODERS`, the outermost where one holds another."""

    def enter(model: nn.Module, _inputs: object) -> None:
        if type(model).__name__ in ENCODERS:
            clock.enter()

    def leave(model: nn.Module, _inputs: object, _output: object) -> None:
        if type(model).__name__ in ENCODERS:
            clock.leave()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def call_timed(owner: Any, name: str, clock: Clock) -> Iterator[None]:
    """Time the calls of the function ``name`` of ``owner`` as loading."""
    original = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.process_time()
        loaded = original(*arguments, **named)
        clock.load += time.process_time() - started
        return loaded

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)


if __name__ == "__main__":
    main()
