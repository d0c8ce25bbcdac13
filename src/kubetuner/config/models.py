"""``model_flavour``: the hub ids of each family's published checkpoints, and facts that need no model to be loaded."""

from dataclasses import dataclass
from pathlib import Path

from kubetuner.config.sections.steps import FamilyName, ModelRef


@dataclass(frozen=True)
class FamilyOutline:
    """What the configuration and the plan need to know of a family.

    Attributes:
        flavours: Hub ids by ``model_flavour``; the first is the default.
        later: Flavours that need training of a stage or refiner.
        denoiser: Subfolder of the trained model.
        parameters: Trainable parameters of the denoiser, by a part of the hub id, in billions; ``""`` matches any.
        vae_factor: Pixels per latent, per edge.
        latent_channels: Channels of a latent.
        text_width: Features of a text token in the published checkpoints.
        text_floats: Largest number of floats one caption's embedding takes there.
        picture_multiple: Edges of validation pictures are multiples of this.
        flow: Whether it trains flow matching, and not diffusion.
        text_encoders: How many it has.
    """

    flavours: dict[str, str]
    later: frozenset[str]
    denoiser: str
    parameters: dict[str, float]
    vae_factor: int
    latent_channels: int
    text_width: int
    text_floats: int
    picture_multiple: int
    flow: bool = False
    text_encoders: int = 1


OUTLINES: dict[FamilyName, FamilyOutline] = {
    "pixart_sigma": FamilyOutline(
        flavours={
            "900M-1024-v0.6": "terminusresearch/pixart-900m-1024-ft-v0.6",
            "600M-512": "PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
            "600M-1024": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
            "600M-2048": "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS",
        },
        later=frozenset({"900M-1024-v0.7-stage1", "900M-1024-v0.7-stage2"}),
        denoiser="transformer",
        parameters={"900m": 0.91, "": 0.61},
        vae_factor=8,
        latent_channels=4,
        text_width=4096,
        text_floats=300 * 4096,
        picture_multiple=16,
    ),
    "sdxl": FamilyOutline(
        flavours={
            "base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
            "base-0.9": "stabilityai/stable-diffusion-xl-base-0.9",
        },
        later=frozenset({"refiner-1.0", "refiner-0.9"}),
        denoiser="unet",
        parameters={"": 2.57},
        vae_factor=8,
        latent_channels=4,
        text_width=2048,
        text_floats=77 * 2048 + 1280,
        picture_multiple=16,
        text_encoders=2,
    ),
    "sana": FamilyOutline(
        flavours={
            "sana1.5-4.8b-1024": "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
            "sana1.5-1.6b-1024": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
            "sana1.0-1.6b-2048": "Efficient-Large-Model/Sana_1600M_2Kpx_BF16_diffusers",
            "sana1.0-1.6b-1024": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
            "sana1.0-600m-1024": "Efficient-Large-Model/Sana_600M_1024px_diffusers",
            "sana1.0-600m-512": "Efficient-Large-Model/Sana_600M_512px_diffusers",
        },
        later=frozenset(),
        denoiser="transformer",
        parameters={"4.8b": 4.72, "_600m": 0.59, "": 1.6},
        vae_factor=32,
        latent_channels=32,
        text_width=2304,
        text_floats=300 * 2304,
        picture_multiple=32,
        flow=True,
    ),
}


def vae_place(ref: ModelRef) -> tuple[ModelRef, str]:
    """Where the VAE of ``ref`` is: the repository or folder, and the subfolder of it, empty for none."""
    if ref.vae_path in ("", ref.path):
        return ref, "vae"
    return ModelRef(family=ref.family, path=ref.vae_path), vae_subfolder(ref.vae_path)


def vae_subfolder(vae_path: str) -> str:
    """``vae`` where the folder ``vae_path`` is a pipeline's, and an empty text where it is a VAE's, or on the hub."""
    return "vae" if (Path(vae_path) / "vae" / "config.json").is_file() else ""
