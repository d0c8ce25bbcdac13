"""From a batch to its loss: what is noised, how the denoiser is asked, and how its answer is scored."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from kubetuner.artifacts import LatentRow
from kubetuner.config.objective import NoiseSettings
from kubetuner.diffusion.process import NoiseProcess, NoisySample
from kubetuner.families.base import Family, Named
from kubetuner.families.lora import without_adapter
from kubetuner.families.text import PAD_TO
from kubetuner.training.noise import draw_noise
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
        noisy = NoisySample(*(_to(tensor, device) for tensor in self.noisy.tensors()))
        conditioning = {name: _to(tensor, device) for name, tensor in self.conditioning.items()}
        return replace(self, noisy=noisy, conditioning=conditioning)

    def named(self) -> Named:
        """All tensors by name."""
        noisy = {field.name: getattr(self.noisy, field.name) for field in fields(self.noisy)}
        return noisy | {f"conditioning.{name}": tensor for name, tensor in self.conditioning.items()}

    def pinned(self) -> "Question":
        """The same in page-locked memory."""
        noisy = NoisySample(*(tensor.pin_memory() for tensor in self.noisy.tensors()))
        conditioning = {name: tensor.pin_memory() for name, tensor in self.conditioning.items()}
        return replace(self, noisy=noisy, conditioning=conditioning)


@dataclass(frozen=True)
class Objective:
    """A family's training objective.

    Attributes:
        null: Embedding of the empty text.
        seed: Seed of noise and noise levels.
        noise: Changes to the noise.
        regularising: Ids of the datasets whose target is the base model's own prediction.
        pad_text_to: Padded texts have a multiple of so many tokens.
    """

    family: Family
    process: NoiseProcess
    null: Named
    seed: int
    mixed_precision: bool
    noise: NoiseSettings = NoiseSettings()
    regularising: frozenset[str] = frozenset()
    pad_text_to: int = PAD_TO

    def question(self, batch: Batch, step: int, micro: int) -> Question:
        """Draw noise and levels for ``batch`` and noise it, on the CPU."""
        latents = batch.latents.float()
        noise = draw_noise(self.noise, latents.shape, self.seed, step, micro)
        levels = self.process.draw_levels(latents.shape, generator(self.seed, "levels", step, micro))
        noisy = self.process.add_noise(latents, noise.target, levels)
        if noise.input is not noise.target:
            noisy = replace(noisy, noisy_latents=self.process.add_noise(latents, noise.input, levels).noisy_latents)
        conditioning = self.family.collate(batch.texts, self.null, batch.rows, self.pad_text_to)
        names = tuple(row.sample for row in batch.rows)
        regularising = batch.rows[0].dataset in self.regularising
        return Question(names, noisy, conditioning, regularising)

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


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
