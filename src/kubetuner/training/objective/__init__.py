"""From a batch to its loss: what is noised, how the denoiser is asked, and how its answer is scored."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.objective import NoiseSettings, RolloutSettings
from kubetuner.diffusion.process import NoiseProcess, NoisySample
from kubetuner.diffusion.rollout import Departure, depart
from kubetuner.families.base import Family, Named
from kubetuner.families.lora import without_adapter
from kubetuner.families.text import PAD_TO
from kubetuner.training.objective.masks import draw_masks
from kubetuner.training.objective.noise import draw_noise
from kubetuner.training.objective.rollout import Arrival, arrival_losses, arrive, as_in_inference, draw_steps
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

    @property
    def before(self) -> int:
        """How many samples of the run come before these, in the order of steps and micro-steps."""
        ...

    @property
    def masks(self) -> Tensor | None:
        """How much each latent pixel counts, ``[B, 1, h, w]`` in 0..1; ``None`` where no sample has a mask."""
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
        departure: Where the samples start whose noisy latents the model draws itself, in place of those in ``noisy``.
    """

    samples: tuple[str, ...]
    noisy: NoisySample
    conditioning: Named
    regularising: bool = False
    departure: Departure | None = None

    def on(self, device: torch.device) -> "Question":
        """The same on ``device``; from pinned memory without waiting for the copy."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def named(self) -> Named:
        """All tensors by name."""
        named = self.noisy.tensors()
        if self.departure is not None:
            named |= {"departure.start": self.departure.start, "departure.levels": self.departure.levels}
        return named | {f"conditioning.{name}": tensor for name, tensor in self.conditioning.items()}

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those of what the denoiser sees: latents and text."""
        return tuple(tuple(tensor.shape) for tensor in (self.noisy.noisy_latents, *self.conditioning.values()))

    def pinned(self) -> "Question":
        """The same in page-locked memory."""
        return self._with_each(Tensor.pin_memory)

    @property
    def asks_ahead(self) -> bool:
        """Whether the denoiser is asked before it is trained on this: for the base's answer, or to roll out."""
        return self.regularising or self.departure is not None

    def of(self, rows: list[int]) -> "Question":
        """Some of the samples, any of them as often as it is named, without their departure."""
        if rows == list(range(len(self.samples))):
            return replace(self, departure=None)
        some = self._with_each(lambda tensor: tensor[rows])
        return replace(some, samples=tuple(self.samples[row] for row in rows), departure=None)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "Question":
        noisy = self.noisy.each(change)
        conditioning = {name: change(tensor) for name, tensor in self.conditioning.items()}
        departure = self.departure and replace(self.departure, start=change(self.departure.start))
        return replace(self, noisy=noisy, conditioning=conditioning, departure=departure)


@dataclass(frozen=True)
class Objective:
    """A family's training objective.

    Attributes:
        process: How all is noised and scored.
        null: Embedding of the empty text.
        seed: Seed of noise and noise levels.
        noise: Changes to the noise.
        regularising: Ids of the datasets whose target is the base model's own prediction; they are never rolled out.
        masked: How likely a sample's mask is used (``masked_loss_probability``), 0..1.
        rollout: Which samples' noisy latents the model draws itself; ``None`` for none.
        drawing: Dataset → the process that draws its noise levels, of those that have one of their own.
        pad_text_to: Padded texts have a multiple of so many tokens.
        whole_batches: A rollout of some samples of a batch asks for as many as the batch has, for want of others the
            first of them again: a compiled network knows no other shape.
    """

    family: Family
    process: NoiseProcess
    null: Named
    seed: int
    mixed_precision: bool
    noise: NoiseSettings = NoiseSettings()
    regularising: frozenset[str] = frozenset()
    masked: float = 1.0
    rollout: RolloutSettings | None = None
    drawing: Mapping[str, NoiseProcess] = field(default_factory=dict)
    pad_text_to: int = PAD_TO
    whole_batches: bool = False

    def question(self, batch: Batch, step: int, micro: int) -> Question:
        """Draw noise and levels for ``batch`` and noise it, on the CPU."""
        latents = batch.latents.float()
        noise = draw_noise(self.noise, latents.shape, self.seed, step, micro)
        dataset = batch.rows[0].dataset
        drawing = self.drawing.get(dataset, self.process)
        levels = drawing.draw_levels(latents.shape, generator(self.seed, "levels", step, micro), batch.before)
        noisy = self.process.add_noise(latents, noise.target, levels)
        if noise.input is not noise.target:
            noisy = replace(noisy, noisy_latents=self.process.add_noise(latents, noise.input, levels).noisy_latents)
        if batch.masks is not None:
            noisy = replace(noisy, emphasis=draw_masks(self.masked, batch.masks, self.seed, step, micro))
        conditioning = self.family.collate(batch.texts, self.null, batch.rows, self.pad_text_to)
        names = tuple(row.sample for row in batch.rows)
        regularising = dataset in self.regularising
        question = Question(names, noisy, conditioning, regularising)
        if self.rollout is None or regularising:
            return question
        steps = draw_steps(self.rollout, self.process.room(levels), self.seed, step, micro)
        return replace(question, departure=depart(self.process, latents, noise.input, levels, steps))

    def answer(self, denoiser: nn.Module, question: Question) -> Tensor:
        """The denoiser's prediction, float32."""
        with self._autocast(question.noisy.noisy_latents.device):
            noisy = question.noisy
            prediction = self.family.predict(denoiser, noisy.noisy_latents, noisy.timesteps, question.conditioning)
        return prediction.float()

    @property
    def asks_ahead(self) -> bool:
        """Whether there may be questions that do."""
        return bool(self.regularising) or self.rollout is not None

    def losses(self, denoiser: nn.Module, question: Question, in_step: Callable[[bool], bool] = bool) -> Tensor:
        """Loss per sample, float32 ``[B]``.

        Args:
            denoiser: The network, as the processes share it.
            question: From :meth:`question`, on the network's device.
            in_step: See :meth:`~kubetuner.training.distributed.processes.Processes.in_step`.
        """
        noisy, arrival = question.noisy, None
        if question.regularising:
            with torch.no_grad(), without_adapter(denoiser):
                in_step(True)
                noisy = replace(noisy, target=self.process.as_target(self.answer(denoiser, question), noisy))
        elif self.rollout is not None and question.departure is not None:
            with as_in_inference(denoiser):
                arrival = self._roll_out(denoiser, question, self.rollout, question.departure, in_step)
            noisy = arrival.drifted
        if self.asks_ahead:
            with as_in_inference(denoiser):
                while in_step(False):
                    self.answer(denoiser, question)
        prediction = self.answer(denoiser, replace(question, noisy=noisy))
        if self.rollout is not None and arrival is not None:
            return arrival_losses(self.rollout, self.process, arrival, prediction)
        return self.process.loss(prediction, noisy)

    def _roll_out(
        self,
        denoiser: nn.Module,
        question: Question,
        rollout: RolloutSettings,
        departure: Departure,
        in_step: Callable[[bool], bool],
    ) -> Arrival:
        def ask(noisy: Tensor, timesteps: Tensor, rows: list[int]) -> Tensor:
            in_step(True)
            count = len(rows)
            if self.whole_batches:
                places = [*range(count), *[0] * (len(question.samples) - count)]
                noisy, timesteps, rows = noisy[places], timesteps[places], [rows[place] for place in places]
            some = question.of(rows)
            noised = replace(some.noisy, noisy_latents=noisy, timesteps=timesteps)
            return self.answer(denoiser, replace(some, noisy=noised))[:count]

        return arrive(rollout, self.process, departure, question.noisy, ask)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if self.mixed_precision else nullcontext()
