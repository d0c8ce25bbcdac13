"""Training real-sized denoisers: pictures a second, TFLOP/s, share of what the card's matrix products reach, memory.

Random weights, random latents and texts of full length, and our own loop, from batch to optimizer step. What a card can
do is measured in the same run. A variant is one or more of these, joined by ``+``:

* ``ours``: what kubetuner does by itself;
* ``compiled``: ``dynamo_backend: inductor``;
* ``native-flash``, ``native-cudnn``, ``native-efficient``, ``xformers``, ``flash-attn-2``, ``flash-attn-3``: attention;
* ``recomputed``: ``gradient_checkpointing``;
* ``channels-last`` and ``contiguous``: the layout of convolutions' weights, whatever the family's is;
* ``unfused``: AdamW in several kernels.

Run ``PYTHONPATH=src:. python -m bench.gpu_training [--cases sdxl-lora-1024,sana-full-512] [--batches 1,8]
[--variants ours,compiled,compiled+native-cudnn] [--steps 20]``; ``--smoke`` does it all with tiny models, on a CPU too.
``--count`` only prints the operations of each case and needs no GPU.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")

import argparse
import gc
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from bench.fixed_batch import FixedBatches
from bench.measure import table
from bench.real_models import Case, Counted, count, write_schedulers
from kubetuner.config.attention import MECHANISMS
from kubetuner.config.compilation import CompileSettings
from kubetuner.config.sections.steps import FamilyName
from kubetuner.families.loading import default_device
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.loop import Job, Outcome, train_denoiser
from kubetuner.training.memory.peak import peak_memory

CASES = (
    "sdxl-lora-512", "sdxl-lora-1024", "pixart_sigma-full-512", "pixart_sigma-full-1024", "sana-full-512",
    "sana-full-1024",
)  # fmt: skip
VARIANTS = "ours,recomputed,compiled,native-cudnn,compiled+native-cudnn,unfused,contiguous,channels-last"
SWITCHES = frozenset({"ours", "compiled", "recomputed", "unfused", "contiguous", "channels-last", *MECHANISMS})
HEAD = (
    "case", "batch", "variant", "images/s", "TFLOP/s", "share of matmul", "peak GB", "first step s", "graphs",
)  # fmt: skip
WARM_UP = 3


@dataclass(frozen=True)
class Run:
    """One row: a case at a batch size in a variant."""

    case: Case
    batch: int
    variant: str

    @property
    def switches(self) -> frozenset[str]:
        """The parts of the variant."""
        return frozenset(self.variant.split("+"))

    def settings(self, steps: int) -> dict[str, object]:
        """The train section's."""
        compilation = CompileSettings(backend="aot_eager" if self.case.tiny else "inductor")
        return {
            "train_batch_size": self.batch,
            "max_train_steps": steps,
            "compilation": compilation if "compiled" in self.switches else None,
            "gradient_checkpointing": "recomputed" in self.switches,
            "attention_mechanism": next((name for name in MECHANISMS if name in self.switches), "diffusers"),
            "optimizer_options": {"fused": False} if "unfused" in self.switches else {},
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--variants", default=VARIANTS)
    parser.add_argument("--steps", type=int, default=20, help="measured steps, after three to warm up")
    parser.add_argument("--count", action="store_true", help="the operations of each case alone")
    parser.add_argument("--smoke", action="store_true", help="tiny models, two steps: shows that the script works")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    device = default_device()
    cases = [_case(name, arguments.smoke) for name in arguments.cases.split(",")]
    if arguments.count:
        print(counted_table(cases))
        return
    if device.type != "cuda" and not arguments.smoke:
        raise SystemExit("there is no GPU here; --smoke runs tiny models on the CPU, --count counts operations")
    torch.set_float32_matmul_precision("high")
    batches = [int(text) for text in arguments.batches.split(",")]
    variants = arguments.variants.split(",")
    if unknown := {part for variant in variants for part in variant.split("+")} - SWITCHES:
        raise SystemExit(f"no such variant: {', '.join(sorted(unknown))}; there are {', '.join(sorted(SWITCHES))}")
    steps = 2 if arguments.smoke else arguments.steps
    with tempfile.TemporaryDirectory() as scratch:
        write_schedulers(Path(scratch))
        rate = matmul_rate(device, 256 if arguments.smoke else 8192)
        print(f"{_name(device)}, torch {torch.__version__}; bf16 matrix products reach {rate / 1e12:.3g} TFLOP/s\n")
        print(table(HEAD, []), flush=True)
        for case in cases:
            counted = count(case, Path(scratch) / case.family)
            for batch in batches:
                for variant in variants:
                    row = measure(Run(case, batch, variant), counted, rate, steps, Path(scratch), device)
                    print("| " + " | ".join(row) + " |", flush=True)


def counted_table(cases: Sequence[Case]) -> str:
    """Operations of a picture's training step, and pictures a second at 100 TFLOP/s."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        write_schedulers(Path(scratch))
        for case in cases:
            counted = count(case, Path(scratch) / case.family)
            sizes = (counted.parameters / 1e6, counted.forward / 1e12, counted.whole / 1e12, 1e14 / counted.whole)
            rows.append([str(case), *(f"{size:,.{digits}f}" for size, digits in zip(sizes, (0, 2, 2, 1), strict=True))])
    return table(("case", "million weights", "TFLOP forward", "TFLOP a step", "images/s per 100 TFLOP/s"), rows)


def measure(run: Run, counted: Counted, rate: float, steps: int, scratch: Path, device: torch.device) -> list[str]:
    """The row of ``run``; ``rate`` in FLOP/s is what matrix products reach."""
    _forget(device)
    try:
        images, first, outcome = train(run, steps, scratch, device)
    except torch.cuda.OutOfMemoryError:
        return [str(run.case), str(run.batch), run.variant, "out of memory", *["-"] * 5]
    achieved = images * counted.whole
    return [
        str(run.case), str(run.batch), run.variant, f"{images:.2f}", f"{achieved / 1e12:.3g}", f"{achieved / rate:.1%}",
        f"{peak_memory(device) / 1e9:.2f}", f"{first:.1f}", str(outcome.graphs.made) if outcome.graphs else "-",
    ]  # fmt: skip


def train(run: Run, steps: int, scratch: Path, device: torch.device) -> tuple[float, float, Outcome]:
    """Pictures a second after warming up, seconds to the end of the first step, and the loop's own account."""
    total = WARM_UP + steps
    section = run.case.section(scratch / run.case.family, **run.settings(total))
    denoiser: Any = run.case.denoiser(section, device)
    for switch, layout in (("channels-last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        if switch in run.switches:
            denoiser.to(memory_format=layout)
    batch = run.case.batch(denoiser, run.batch)
    objective = run.case.objective(section, batch)
    job = Job(section, denoiser, objective, FixedBatches(batch), lambda taken: float(taken), total, device)
    ends: list[float] = []

    def log(_values: Mapping[str, float], _step: int) -> None:
        ends.append(time.perf_counter())

    started = time.perf_counter()
    outcome = train_denoiser(job, Checkpoints(scratch / "checkpoints", "bench", 1), log)
    # The loop logs a step when its numbers have arrived; on a GPU the next one is under way by then.
    return run.batch * steps / (ends[-1] - ends[-1 - steps]), ends[0] - started, outcome


def matmul_rate(device: torch.device, edge: int) -> float:
    """FLOP/s of the best of several bfloat16 products of square matrices."""
    left, right = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    repeats, best = 20, float("inf")
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            left @ right
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return repeats * 2 * edge**3 / best


def _case(name: str, tiny: bool) -> Case:
    try:
        family, model_type, edge = name.rsplit("-", 2)
        known = next(one for one in get_args(FamilyName) if one == family)
    except (ValueError, StopIteration) as error:
        raise SystemExit(f"no such case: {name}; there are {', '.join(CASES)}") from error
    return Case(known, model_type, 64 if tiny else int(edge), tiny)


def _forget(device: torch.device) -> None:
    """Nothing of the run before stays in memory or compiled."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
