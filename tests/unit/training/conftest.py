from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.steps import DatasetSampling, ModelRef, TrainSection
from kubetuner.families import load_family
from kubetuner.families.base import Named
from kubetuner.training.denoiser import prepare_denoiser
from kubetuner.training.loop import Job
from kubetuner.training.objective import Objective
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

TEXT = {
    "pixart_sigma": {"embeds": (5, 16)},
    "sana": {"embeds": (5, 16)},
    "sdxl": {"embeds": (77, 32), "pooled": (16,)},
}


ALL = -2
NAMES = ("first.png", "second.png", "third.png")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class RandomBatch:
    rows: Sequence[LatentRow]
    latents: Tensor
    texts: Sequence[Named | None]
    before: int = 0
    masks: Tensor | None = None


@dataclass
class RandomBatches:
    """Random latents and texts, the same for a position; notes the positions asked for and may act at one.

    ``sizes`` are the samples of a step's micro-batches: so many of dataset ``a``, and those of another number than the
    first of dataset ``b``.
    """

    family: str
    broken_step: int = -1
    act: Callable[[int], None] = lambda _step: None
    asked: list[tuple[int, int]] = field(default_factory=list)
    masks: Tensor | None = None
    sizes: tuple[int, ...] = (2,)

    def batch(self, step: int, micro: int) -> RandomBatch:
        self.asked.append((step, micro))
        self.act(step)
        generator = torch.Generator().manual_seed(1000 * step + micro)
        size = self.sizes[micro % len(self.sizes)]
        latents = torch.randn(size, 4, 8, 8, generator=generator)
        if step == self.broken_step or self.broken_step == ALL:
            latents[1] = float("nan")
        texts = {name: torch.randn(shape, generator=generator) for name, shape in TEXT[self.family].items()}
        rows = [_row(name, "a" if size == self.sizes[0] else "b") for name in NAMES[:size]]
        before = step * sum(self.sizes) + sum(self.sizes[:micro])
        return RandomBatch(rows, latents, [texts, None, texts][:size], before, self.masks)


@dataclass(frozen=True)
class Setup:
    bases: Path
    device: torch.device = CPU

    def job(self, family: str, batches: RandomBatches, **settings: object) -> Job:
        """A fresh denoiser and a section with ``settings`` for it."""
        ref = ModelRef.model_validate({"family": family, "path": str(self.bases / family)})
        base = {
            "model": ref,
            "model_type": "lora",
            "lora": LoraSettings(rank=2, alpha=4.0, dropout=0.3),
            "datasets": (DatasetSampling(id="a"),),
            "max_train_steps": 6,
            "learning_rate": 1e-2,
            "lr_scheduler": "cosine",
            "checkpoint_step_interval": 0,
        }
        section = TrainSection.model_validate(base | settings)
        made = load_family(ref.family)
        denoiser = prepare_denoiser(section, made, self.device)
        null = {name: torch.zeros(shape) for name, shape in TEXT[family].items()}
        process = made.noise_process(ref, section.process())
        bf16 = section.mixed_precision == "bf16"
        objective = Objective(
            made,
            process,
            null,
            section.seed,
            bf16,
            noise=section.noise,
            masked=section.masked_loss_probability,
            rollout=section.rollout,
            whole_batches=section.compilation is not None,
        )
        return Job(
            section, denoiser, objective, batches, lambda taken: taken / 10, section.max_train_steps, self.device
        )


@pytest.fixture(scope="session")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    bases = tmp_path_factory.mktemp("bases")
    for family in TEXT:
        write_pipeline(build_pipeline(family, "unit"), bases / family)
    return Setup(bases)


def _row(name: str, dataset: str) -> LatentRow:
    return LatentRow(
        sample=f"{dataset}/{name}", dataset=dataset, key=name, shard="s", intermediary_size=(64, 64), crop=(0, 0),
        target_size=(64, 64), bucket="1.0",
    )  # fmt: skip
