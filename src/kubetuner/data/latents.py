"""Cached latents: one sample of the VAE's distribution, or its moments to draw from anew."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor

from kubetuner.artifacts import LatentRow, LatentsArtifact

SAMPLE = ("latents",)
MOMENTS = ("mean", "std")


class Maker(Protocol):
    """Makes latents that no shard holds; see :mod:`kubetuner.families.on_demand`."""

    def tensors(self, rows: Sequence[LatentRow], coming: Sequence[LatentRow] = ()) -> list[dict[str, Tensor]]:
        """Per row its sample or moments; ``coming`` rows are asked for next."""
        ...

    def look(self) -> None:
        """Find what other processes have made."""
        ...

    def renew_claims(self) -> None:
        """Keep what is stored from being collected as garbage."""
        ...


def latent_names(artifact: LatentsArtifact) -> tuple[str, ...]:
    """The tensors that each sample of ``artifact`` has."""
    return MOMENTS if MOMENTS[0] in artifact.tensors else SAMPLE


def draw_latents(tensors: Mapping[str, Tensor], generator: Generator) -> Tensor:
    """Latents float32 ``[C, h, w]``: the stored sample, or one drawn from the stored moments."""
    if SAMPLE[0] in tensors:
        return tensors[SAMPLE[0]].float()
    mean, std = (tensors[name].float() for name in MOMENTS)
    return mean + std * torch.randn(mean.shape, generator=generator)


def key_generator(key: str) -> Generator:
    """Random numbers that depend on a sample's content key alone."""
    return Generator().manual_seed(int(key[:15], 16))
