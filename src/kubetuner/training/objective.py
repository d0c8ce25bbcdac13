"""From a batch to its loss: what is noised, how the denoiser is asked, and how its answer is scored."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from kubetuner.artifacts import LatentRow
from kubetuner.diffusion.process import NoiseProcess, NoisySample
from kubetuner.families.base import Family, Named
from kubetuner.families.lora import without_adapter
from kubetuner.training.randomness import generator


class Batch(Protocol):
    """What the loop reads of a batch: rows, latents ``[B, C, h, w]`` and one text, or ``None``, per row."""

    @property
    def rows(self) -> Sequence[LatentRow]:
        """The samples."""
        ...

    @property
    def latents(self) -> Tensor:
        """Their latents."""
        ...

    @property
    def texts(self) -> Sequence[Named | None]:
        """Their captions' embeddings; ``None`` for a dropped caption."""
        ...


class BatchSource(Protocol):
    """Batches by position alone, so that resuming needs no state."""

    def batch(self, step: int, micro: int) -> Batch:
        """The batch of an optimizer step's micro-step."""
        ...


@dataclass(frozen=True)
class Question:
    """A noised batch on its way to the denoiser.

    Attributes:
        regularising: The adapter is to answer as the base model does (``is_regularisation_data``); the target in
            ``noisy`` is not used.
    """

    samples: tuple[str, ...]
    noisy: NoisySample
    conditioning: Named
    regularising: bool = False

    def on(self, device: torch.device) -> "Question":
        """The same on ``device``; from pinned memory without waiting for the copy."""
        noisy = NoisySample(*(_to(tensor, device) for tensor in _tensors(self.noisy)))
        conditioning = {name: _to(tensor, device) for name, tensor in self.conditioning.items()}
        return replace(self, noisy=noisy, conditioning=conditioning)

    def pinned(self) -> "Question":
        """The same in page-locked memory."""
        noisy = NoisySample(*(tensor.pin_memory() for tensor in _tensors(self.noisy)))
        conditioning = {name: tensor.pin_memory() for name, tensor in self.conditioning.items()}
        return replace(self, noisy=noisy, conditioning=conditioning)


@dataclass(frozen=True)
class Objective:
    """A family's training objective.

    Attributes:
        null: Embedding of the empty text.
        seed: Seed of noise and noise levels.
        regularising: Ids of the datasets whose target is the base model's own prediction.
    """

    family: Family
    process: NoiseProcess
    null: Named
    seed: int
    mixed_precision: bool
    regularising: frozenset[str] = frozenset()

    def question(self, batch: Batch, step: int, micro: int) -> Question:
        """Draw noise and levels for ``batch`` and noise it, on the CPU."""
        latents = batch.latents.float()
        noise = torch.randn(latents.shape, generator=generator(self.seed, "noise", step, micro))
        levels = self.process.draw_levels(len(latents), generator(self.seed, "levels", step, micro))
        conditioning = self.family.collate(batch.texts, self.null, batch.rows)
        names = tuple(row.sample for row in batch.rows)
        regularising = batch.rows[0].dataset in self.regularising
        return Question(names, self.process.add_noise(latents, noise, levels), conditioning, regularising)

    def answer(self, denoiser: nn.Module, question: Question) -> Tensor:
        """The denoiser's prediction, float32."""
        with self._autocast(question.noisy.noisy_latents.device):
            noisy = question.noisy
            prediction = self.family.predict(denoiser, noisy.noisy_latents, noisy.timesteps, question.conditioning)
        return prediction.float()

    def losses(self, denoiser: nn.Module, question: Question) -> Tensor:
        """Loss per sample, float32 ``[B]``."""
        noisy = question.noisy
        if question.regularising:
            with torch.no_grad(), without_adapter(denoiser):
                noisy = replace(noisy, target=self.answer(denoiser, question))
        return self.process.loss(self.answer(denoiser, question), noisy)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if self.mixed_precision else nullcontext()


def _tensors(noisy: NoisySample) -> tuple[Tensor, Tensor, Tensor]:
    return noisy.noisy_latents, noisy.timesteps, noisy.target


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
