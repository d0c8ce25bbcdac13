"""Runs of the training loop, the same alone and as one of two processes; ``python -m`` is how those are started."""

import logging
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kubetuner.config.compilation import CompileSettings
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.distribution import FsdpSettings
from kubetuner.config.sections.objective import EmaSettings, ReflexSettings, RolloutSettings
from kubetuner.config.sections.steps import DatasetSampling
from kubetuner.errors import TrainingError
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.distributed.processes import ALONE, Processes, joined, of_group
from kubetuner.training.loop import train_denoiser
from kubetuner.training.saving import gathered
from tests.unit.training.conftest import RandomBatch, RandomBatches, Setup

DDP, FSDP = None, FsdpSettings()
LOHA = LoraSettings(algorithm="loha", rank=2, alpha=2.0, module_dropout=0.4, target_classes=("Attention",))
PISSA = LoraSettings(rank=2, alpha=2.0, dropout=0.0, init_type="pissa", target_modules=("to_q", "proj_out"))
SOMETIMES = RolloutSettings(max_offset=3, probability=0.5, final_probability=0.5)
REFLEX = SOMETIMES.model_copy(update={"reflex": ReflexSettings()})
LORA = LoraSettings(rank=2, alpha=4.0, dropout=0.0)  # Compiled dropout draws other numbers.
EAGER, AOT = CompileSettings(backend="eager"), CompileSettings(backend="aot_eager")
FULL = {"model_type": "full", "lora": None}


@dataclass(frozen=True)
class Case:
    """A run of three steps.

    Attributes:
        accumulation: ``gradient_accumulation_steps`` of each of two processes; one alone has twice as many.
        regularising: Every second batch is of regularisation data.
        sizes: Samples of the micro-batches of a step of all processes: see ``RandomBatches``.
        broken_step: Its latents are not finite.
        interrupted: One process alone took so many steps, and two go on from its checkpoint.
        rounding: How far apart numbers may be, relatively.
    """

    family: str
    fsdp: FsdpSettings | None = DDP
    settings: Mapping[str, object] = field(default_factory=dict)
    accumulation: int = 1
    broken_step: int = -1
    regularising: bool = False
    sizes: tuple[int, ...] = (2,)
    interrupted: int = 3
    rounding: float = 1e-4


CASES = {
    "pixart-full-ddp": Case("pixart_sigma", settings=FULL),
    "sdxl-full-fsdp": Case("sdxl", FSDP, FULL),
    "sdxl-lora-ddp": Case("sdxl", accumulation=2),
    "sdxl-lora-fsdp-bf16": Case("sdxl", FSDP, {"mixed_precision": "bf16"}, rounding=1e-2),
    "sana-full-ddp": Case("sana", settings=FULL | {"ema": EmaSettings(decay=0.9)}),
    "sana-full-fsdp": Case("sana", FSDP, FULL | {"ema": EmaSettings(decay=0.9)}, accumulation=2),
    "sana-whole-fsdp": Case("sana", FsdpSettings(wrap_blocks=False), FULL | {"ema": EmaSettings(device="accelerator")}),
    "sana-bitfit-fsdp": Case("sana", FSDP, FULL | {"layer_freeze_strategy": "bitfit"}),
    "sana-dora-fsdp": Case("sana", FSDP, {"lora": LoraSettings(rank=2, alpha=4.0, dropout=0.3, use_dora=True)}),
    "sana-loha-ddp": Case("sana", settings={"lora": LOHA}, accumulation=2),
    "sana-regularised-ddp": Case("sana", regularising=True),
    "sana-regularised-fsdp": Case("sana", FSDP, regularising=True),
    "sana-pissa-fsdp": Case("sana", FSDP, {"lora": PISSA}, regularising=True),
    "sana-reflex-fsdp": Case("sana", FSDP, FULL | {"rollout": REFLEX}, accumulation=2),
    "sdxl-rollout-fsdp": Case("sdxl", FSDP, {"rollout": SOMETIMES}),
    "sana-compiled-fsdp": Case("sana", FSDP, {"compilation": EAGER, "lora": LORA}, regularising=True),
    "sana-compiled-full-fsdp": Case("sana", FSDP, FULL | {"compilation": AOT, "rollout": REFLEX}, accumulation=2),
    "sana-by-value-fsdp": Case("sana", FSDP, {"grad_clip_method": "value", "max_grad_norm": 1e-4}),
    "sana-lion-fsdp": Case("sana", FSDP, FULL | {"optimizer": "optimi-lion", "learning_rate": 1e-4}),
    "sana-optimi-fsdp": Case("sana", FSDP, FULL | {"optimizer": "optimi-adamw"}),
    "sdxl-sizes-ddp": Case("sdxl", settings=FULL, accumulation=2, sizes=(2, 3, 3, 1)),
    "sana-sizes-fsdp": Case("sana", FSDP, FULL, sizes=(1, 3)),
    "sana-sizes-regularised-fsdp": Case("sana", FSDP, regularising=True, accumulation=2, sizes=(3, 1, 2, 3)),
    "sana-sizes-compiled-fsdp": Case("sana", FSDP, {"compilation": EAGER, "lora": LORA}, sizes=(1, 3)),
    "sana-sizes-stopped-ddp": Case("sana", broken_step=1, sizes=(3, 2)),
    "sana-skipped-ddp": Case("sana", settings={"nonfinite_loss": "skip"}, broken_step=1),
    "sana-stopped-ddp": Case("sana", broken_step=1),
    "sana-stopped-fsdp": Case("sana", FSDP, broken_step=1),
    "sana-resumed-ddp": Case("sana", settings=FULL, interrupted=1),
    "sana-resumed-fsdp": Case("sana", FSDP, FULL | {"ema": EmaSettings(decay=0.9)}, interrupted=1),
    "sdxl-resumed-fsdp": Case("sdxl", FSDP, interrupted=1),
}


DATASETS = (DatasetSampling(id="a"), DatasetSampling(id="b", train_batch_size=3))  # Of more than one size.


class _Mixed(RandomBatches):
    """Every second batch is of the dataset ``kept``."""

    def batch(self, step: int, micro: int) -> RandomBatch:
        made = super().batch(step, micro)
        rows = [row.model_copy(update={"dataset": "kept"}) for row in made.rows]
        return replace(made, rows=rows) if micro % 2 else made


def train_case(name: str, setup: Setup, out: Path, processes: Processes = ALONE, steps: int = 3) -> None:
    """Train up to ``steps`` and leave losses, the gradient's size, and weights, or the error, in ``out/name``."""
    case = CASES[name]
    out = out / name
    out.mkdir(parents=True, exist_ok=True)
    settings = {"mixed_precision": "no", "max_train_steps": 3, "max_grad_norm": 0.05, "learning_rate": 1e-3}
    settings |= {"lr_scheduler": "constant", "adam_epsilon": 1e-4, "checkpoint_step_interval": 1} | dict(case.settings)
    if processes is ALONE:
        settings["compilation"] = None
    accumulation = case.accumulation * (2 if processes is ALONE else 1)
    batches = (_Mixed if case.regularising else RandomBatches)(
        case.family, broken_step=case.broken_step, sizes=case.sizes
    )
    job = setup.job(case.family, batches, gradient_accumulation_steps=accumulation, **settings)
    job = replace(job, processes=processes, total_steps=steps)
    if case.regularising:
        job = replace(job, objective=replace(job.objective, regularising=frozenset({"kept"})))
        _spoil(job.trained())
    logged: list[Tensor] = []

    def log(values: Mapping[str, float], step: int) -> None:
        logged.append(torch.tensor([step, *(values[key] for key in sorted(values))], dtype=torch.float64))

    try:
        graphs = train_denoiser(job, Checkpoints(out, "key", 5), log).graphs
        assert graphs is None or (graphs.made and not graphs.unexpected), graphs
    except TrainingError as error:
        (out / f"error-{processes.rank}").write_text(str(error))
    trained = gathered(job).trained()
    if processes.first:
        weights = {key: value.detach().clone() for key, value in trained.items()}
        save_file({"logged": torch.stack(logged)} | weights, out / "result.safetensors")
    processes.wait()


def _spoil(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Give the adapter something to unlearn: a fresh LoRA changes nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def main(folder: Path) -> None:
    """Train all cases as the process that the environment names; what is unforeseen goes to ``out/name``."""
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    bases, out = (Path(line) for line in (folder / "argument").read_text().splitlines())
    setup = Setup(bases)
    section = setup.job("sana", RandomBatches("sana")).section
    with joined(section):
        for name, case in CASES.items():
            settings = {"fsdp": case.fsdp, "gradient_accumulation_steps": case.accumulation}
            settings["lora"] = case.settings.get("lora", LoraSettings())
            settings["datasets"] = DATASETS[: len(set(case.sizes))]
            processes = of_group(section.model_copy(update=settings))
            try:
                train_case(name, setup, out, processes)
            except Exception:  # noqa: BLE001 - the test of the case shows it
                (out / name / f"unforeseen-{processes.rank}").write_text(traceback.format_exc())
                os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
