"""Pixels to what caches keep of their latents, with the bits that every step gives them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kubetuner.config.sections.steps import ModelRef
from kubetuner.data.latents import MOMENTS, SAMPLE, key_generator
from kubetuner.data.pictures import to_floats
from kubetuner.families import load_family
from kubetuner.families.base import Family, Named
from kubetuner.families.loading import default_device
from kubetuner.families.transfers import Arriving, one_behind, sent

Batch = tuple[Sequence[str], Sequence[Tensor]]
"""Content keys of some pictures of one size, and their pixels: uint8 ``[3, H, W]`` each."""


@dataclass(frozen=True)
class Encoder:
    """A VAE and how it is asked.

    Kernels are chosen by the shape of a whole batch, so the last bits of a picture's latents depend on how many are
    encoded together, though not on which. Therefore every batch is filled up to ``batch_size``.

    Attributes:
        dtype: Of what it makes.
        batch_size: Pictures encoded at once (``vae_batch_size``).
    """

    family: Family
    vae: nn.Module
    dtype: torch.dtype
    batch_size: int

    @property
    def device(self) -> torch.device:
        """Where the VAE is."""
        return next(self.vae.parameters()).device

    def encode(self, keys: Sequence[str], pixels: Sequence[Tensor], *, moments: bool) -> list[Named | None]:
        """Per picture its tensors on the CPU, ``None`` where they are not finite.

        Args:
            keys: Content keys; the posterior's noise is drawn from them.
            pixels: uint8 ``[3, H, W]`` of one size, at most ``batch_size`` pictures.
            moments: Give mean and standard deviation instead of a sample.
        """
        return self._begin(keys, pixels, moments).results()

    def encode_all(self, batches: Iterable[Batch], *, moments: bool) -> Iterator[tuple[str, Named | None]]:
        """Key by key what :meth:`encode` gives; a GPU gets the next batch before it has finished with the last."""
        for begun in one_behind(self._begin(keys, pixels, moments) for keys, pixels in batches):
            yield from zip(begun.keys, begun.results(), strict=True)

    def _begin(self, keys: Sequence[str], pixels: Sequence[Tensor], moments: bool) -> "_Begun":
        with _products_of_training(self.device):
            return _Begun(keys, Arriving(self._encode(keys, pixels, moments), self.dtype))

    def _encode(self, keys: Sequence[str], pixels: Sequence[Tensor], moments: bool) -> Named:
        """For a full batch, on the VAE's device; it is filled up with the last picture."""
        missing = self.batch_size - len(keys)
        # Colours last, as they lie in memory: stacked otherwise they would be sorted here, and back by the autoencoder.
        stacked = torch.stack([one.permute(1, 2, 0) for one in [*pixels, *[pixels[-1]] * missing]])
        # Whole bytes travel: a quarter of what floats would be.
        full = to_floats(sent(stacked, self.device).permute(0, 3, 1, 2))
        if moments:
            return dict(zip(MOMENTS, self.family.encode_moments(self.vae, full), strict=True))
        shape = self.family.latent_shape(self.vae, full.shape[2], full.shape[3])
        noise = [torch.randn(shape, generator=key_generator(key)) for key in keys]
        noises = torch.stack([*noise, *[noise[-1]] * missing])
        return {SAMPLE[0]: self.family.encode_pixels(self.vae, full, sent(noises, self.device))}


@dataclass(frozen=True)
class _Begun:
    """A batch whose latents are on their way."""

    keys: Sequence[str]
    arriving: Arriving

    def results(self) -> list[Named | None]:
        """See :meth:`Encoder.encode`."""
        made = self.arriving.tensors()
        finite = torch.stack([one.isfinite().flatten(1).all(1) for one in made.values()]).all(0).tolist()
        return [
            {name: one[place].clone() for name, one in made.items()} if finite[place] else None
            for place in range(len(self.keys))
        ]


def load_encoder(model: ModelRef, dtype: Literal["bf16", "fp32"], batch_size: int) -> Encoder:
    """The model's VAE, on the GPU if there is one."""
    family = load_family(model.family)
    kept = torch.bfloat16 if dtype == "bf16" else torch.float32
    return Encoder(family, family.load_vae(model, default_device()), kept, batch_size)


@contextmanager
def _products_of_training(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 as ``train`` has them on a GPU, so that a cache has the bits that it would make."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
