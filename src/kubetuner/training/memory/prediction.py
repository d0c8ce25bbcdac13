"""The peak of GPU memory in training, found by running a step on tensors that have shapes and no contents.

The network is made from its configuration alone, with the adapter, the rounded weights and the recomputed blocks that
the section asks for. One forward and backward pass on PyTorch's ``meta`` device then makes and frees every tensor that
the real one would. That takes seconds on a CPU and no memory to speak of.

Not seen is what kernels take for themselves (cuDNN's workspaces), the CUDA context, and memory lost between blocks.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from kubetuner.config.optimizers import OPTIMIZERS
from kubetuner.config.sections.steps import TrainSection
from kubetuner.families import load_family
from kubetuner.families.architectures import outline_denoiser
from kubetuner.families.base import Family
from kubetuner.families.quantised_outlines import outline_quantised
from kubetuner.training.denoiser import choose_trained
from kubetuner.training.memory.encoding import Encoding
from kubetuner.training.memory.gpu_rules import GpuRules
from kubetuner.training.memory.ledger import Ledger
from kubetuner.training.recompute import recompute_activations

_NO_ENCODING = Encoding()
_WORKSPACE = 32 * 2**20
"""cuBLAS keeps so much for its matrix products."""


@dataclass(frozen=True)
class Shapes:
    """A batch's shapes.

    Attributes:
        latents: (channels, height, width) of one sample's latents.
        tokens: Of one caption, at most.
        batch: Samples; ``None`` for the section's ``train_batch_size``.
    """

    latents: tuple[int, int, int]
    tokens: int
    batch: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU while training.

    Attributes:
        weights: Of the whole denoiser, adapter included.
        gradients: Of what is trained.
        optimizer: The optimizer's state.
        averages: Of EMA, where they are on the accelerator.
        activations: What the fullest moment of a step holds besides: activations, casts of weights, gradients passed
            on; less than 0 where that moment comes before all gradients are there.
        loading: The base before its weights are rounded (``base_model_precision``).
        encoding: Of the autoencoder that makes latents meanwhile, if one does.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    loading: int
    encoding: Encoding = _NO_ENCODING

    @property
    def peak(self) -> int:
        """Most bytes allocated at any moment; pictures are encoded beside a step, and never while the base loads."""
        step = self.weights + self.gradients + self.optimizer + self.averages + self.activations
        return max(step + self.encoding.activations, self.loading) + self.encoding.weights + _WORKSPACE


@dataclass(frozen=True)
class _Trace:
    """Bytes of one step without the optimizer's state and averages, which are there throughout."""

    weights: int
    trained: int
    peak: int
    loading: int


class Predictor:
    """Predicts for sections that differ in some settings; what one of them took to find is kept for the others.

    Args:
        shapes: Of the batch.
        encoding: What makes latents meanwhile takes.
    """

    def __init__(self, shapes: Shapes, encoding: Encoding = _NO_ENCODING) -> None:
        self._shapes, self._encoding = shapes, encoding
        self._traces: dict[str, _Trace] = {}

    def predict(self, section: TrainSection) -> Memory:
        """What ``torch.cuda.max_memory_allocated`` would show after a few steps.

        Raises:
            InputError: The model's configuration is not to be had, or the adapter does not fit it.
        """
        key = section.model_copy(update={"optimizer": "torch-adamw", "ema": None}).to_json()
        if key not in self._traces:
            self._traces[key] = _trace(section, self._shapes)
        found = self._traces[key]
        on_gpu = section.ema is not None and section.ema.device == "accelerator"
        gradients = 4 * found.trained
        return Memory(
            weights=found.weights,
            gradients=gradients,
            optimizer=int(found.trained * OPTIMIZERS[section.optimizer].state_bytes),
            averages=4 * found.trained if on_gpu else 0,
            activations=found.peak - found.weights - gradients,
            loading=found.loading,
            encoding=self._encoding,
        )


def _trace(section: TrainSection, shapes: Shapes) -> _Trace:
    family = load_family(section.model.family)
    denoiser = outline_denoiser(section.model)
    if section.frozen_in_bf16:
        for parameter in denoiser.parameters():  # Loading leaves buffers as they are, too.
            parameter.data = parameter.data.to(torch.bfloat16)
    loading = _bytes(denoiser)
    denoiser = _prepare(section, family, outline_quantised(denoiser, section.base_model_precision))
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    with Ledger() as ledger:
        for tensor in [*denoiser.parameters(), *denoiser.buffers()]:
            ledger.note(tensor)
        weights = ledger.live
        if section.gradient_accumulation_steps > 1:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        _step(section, family, denoiser, shapes)
    return _Trace(weights, sum(parameter.numel() for parameter in trained), ledger.peak, loading)


def _bytes(denoiser: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*denoiser.parameters(), *denoiser.buffers()])


def _prepare(section: TrainSection, family: Family, denoiser: nn.Module) -> nn.Module:
    """As :func:`kubetuner.training.denoiser.prepare_denoiser` does it, less what needs contents or a GPU."""
    if section.gradient_checkpointing:
        recompute_activations(
            denoiser, section.gradient_checkpointing_interval, lambda: (nullcontext(), _rules(section))
        )
    lora = section.lora
    fresh = None if lora is None else lora.model_copy(update={"init_lora": "", "init_type": "default"})
    return choose_trained(denoiser, section.model_copy(update={"lora": fresh}), family).train()


def _rules(section: TrainSection) -> GpuRules:
    bf16, math_attention = section.mixed_precision == "bf16", section.attention_mechanism == "native-math"
    return GpuRules(bf16=bf16, math_attention=math_attention)


def _step(section: TrainSection, family: Family, denoiser: nn.Module, shapes: Shapes) -> None:
    """Forward and backward, as :class:`kubetuner.training.objective.Objective` does it."""
    batch = shapes.batch or section.train_batch_size
    conditioning = family.conditioning_shapes(denoiser, shapes.tokens)
    with torch.device("meta"):
        noisy, target = torch.empty(batch, *shapes.latents), torch.empty(batch, *shapes.latents)
        timesteps = torch.empty(batch)
        text = {name: torch.empty(batch, *shape) for name, shape in conditioning.items()}
    with _rules(section):
        prediction = family.predict(denoiser, noisy, timesteps, text)
    loss = (prediction.float() - target).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
