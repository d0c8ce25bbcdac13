"""What the autoencoder takes of a GPU that trains, where latents are made meanwhile; found as for a step."""

from dataclasses import dataclass

import torch

from kubetuner.config.sections.steps import ModelRef
from kubetuner.data.pictures import to_floats
from kubetuner.families import load_family
from kubetuner.families.architectures import outline_autoencoder
from kubetuner.training.memory.gpu_rules import GpuRules
from kubetuner.training.memory.ledger import Ledger


@dataclass(frozen=True)
class Encoding:
    """Bytes on the GPU.

    Attributes:
        weights: Of the whole autoencoder: its decoder is loaded too.
        activations: What the fullest moment of encoding holds besides.
    """

    weights: int = 0
    activations: int = 0


def predict_encoding(model: ModelRef, pictures: int, size: tuple[int, int], *, moments: bool) -> Encoding:
    """What encoding takes, float32 as :mod:`kubetuner.families.encoding` does it.

    Args:
        model: Whose VAE.
        pictures: Encoded at once (``vae_batch_size``).
        size: Width and height of the largest, in pixels.
        moments: Mean and standard deviation are made, and not a sample.

    Raises:
        InputError: The VAE's configuration is not to be had.
    """
    family, vae = load_family(model.family), outline_autoencoder(model)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    width, height = size
    shape = family.latent_shape(vae, height, width)
    with Ledger() as ledger:
        for tensor in [*vae.parameters(), *vae.buffers()]:
            ledger.note(tensor)
        weights = ledger.live
        with torch.no_grad(), GpuRules(bf16=False):
            # Colours last, as they come from the picture: sorted otherwise, they would be sorted back in another copy.
            colours = torch.empty(pictures, height, width, 3, dtype=torch.uint8, device="meta")
            pixels = to_floats(colours.permute(0, 3, 1, 2))
            if moments:
                family.encode_moments(vae, pixels)
            else:
                family.encode_pixels(vae, pixels, torch.empty(pictures, *shape, device="meta"))
    return Encoding(weights, ledger.peak - weights)
