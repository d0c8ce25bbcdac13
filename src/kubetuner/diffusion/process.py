"""What every noise process offers the training loop and the evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from torch import Generator, Tensor


@dataclass(frozen=True)
class NoisySample:
    """A noised batch and what the model should say about it.

    Attributes:
        noisy_latents: Model input, float32 ``[B, C, h, w]``.
        timesteps: What the model is told: int64 0..999 (epsilon) or float32 ``1000 * sigma`` (flow), ``[B]``.
        target: What the prediction is compared with, float32 ``[B, C, h, w]``.
        weights: Factor of each sample's loss, float32 ``[B]``.
        turns: ``huber_c`` of each sample, float32 ``[B]``; not used by the squared error.
        emphasis: Factor of each element's loss, float32 ``[B, 1 or C, h, w]``: a mask, ReflexFlow's weights, or both
            multiplied; ``None`` where all count the same.
    """

    noisy_latents: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor
    turns: Tensor
    emphasis: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in found if tensor is not None}

    def each(self, change: Callable[[Tensor], Tensor]) -> "NoisySample":
        """The same with every tensor changed."""
        return NoisySample(**{name: change(tensor) for name, tensor in self.tensors().items()})


class NoiseProcess(Protocol):
    """How latents are noised, what is predicted, and how predictions are scored."""

    def draw_levels(self, shape: Sequence[int], generator: Generator, before: int = 0) -> Tensor:
        """Draw one noise level per sample of latents ``[B, C, h, w]``: timesteps (epsilon) or sigmas (flow), on CPU.

        ``before`` counts the samples of the run before these, for levels that are taken one after the other.
        """
        ...

    def eval_levels(self, count: int) -> Tensor:
        """``count`` evenly spread noise levels (bin mid-points), ``[count]``, for the fixed-noise evaluation loss."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> NoisySample:
        """Noise ``latents`` float32 ``[B, C, h, w]`` at ``levels`` ``[B]``."""
        ...

    def loss(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """Loss per sample, float32 ``[B]``; its mean is the training loss."""
        ...

    def as_target(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """What the model said of ``sample``, in the space of its target."""
        ...

    def clean(self, prediction: Tensor, noisy: Tensor, levels: Tensor) -> Tensor:
        """The latents without noise that a prediction stands for, ``[B, C, h, w]``."""
        ...

    def rates(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the latents and of the noise at ``levels`` of any shape, float64."""
        ...

    def timesteps(self, levels: Tensor) -> Tensor:
        """What the model is told at ``levels``."""
        ...

    def room(self, levels: Tensor) -> Tensor:
        """How many timesteps above ``levels`` ``[B]`` the picture still shows, so that a rollout may begin; int64."""
        ...

    def noisier(self, levels: Tensor, steps: Tensor) -> Tensor:
        """The levels ``steps`` timesteps above ``levels``; both of one shape."""
        ...


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1, 1, 1]`` on the device of ``like``."""
    return values.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
