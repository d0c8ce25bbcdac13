"""Autoencoders and text encoders as wide as the published ones, with random weights, and cut where a CPU needs it.

The numbers are those of the published checkpoints' ``config.json``. Autoencoders are whole where they encode. Text
encoders have the published width, heads and feed-forward layers, and of the layers as many as :data:`TEXT_LAYERS` says;
vocabularies are the demo's.
"""

from typing import Any

from diffusers import AutoencoderDC, AutoencoderKL

from kubetuner.families.architectures import PUBLISHED_DC, PUBLISHED_KL

TEXT_LAYERS = {"T5-XXL": (2, 24), "CLIP-L": (12, 12), "OpenCLIP-bigG": (8, 32), "Gemma-2-2b": (2, 26)}
"""Layers here, and as published."""
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}


def cuts() -> str:
    """What the text encoders here lack, in words."""
    return ", ".join(f"{here} of {published} layers of {name}" for name, (here, published) in TEXT_LAYERS.items())


def autoencoder(family: str) -> AutoencoderDC | AutoencoderKL:
    """The DC-AE f32c32 of Sana, or the KL autoencoder of SDXL, which is PixArt Sigma's too."""
    if family == "sana":
        return _dc()
    made: AutoencoderKL = AutoencoderKL.from_config(PUBLISHED_KL | {"sample_size": 1024, "scaling_factor": 0.13025})
    return made


def _dc() -> AutoencoderDC:
    """Its decoder, which is not asked here, has a third of its layers."""
    made: AutoencoderDC = AutoencoderDC.from_config(
        PUBLISHED_DC | {"decoder_layers_per_block": (1,) * 6, "scaling_factor": 0.41407}
    )
    return made


def text_sizes(encoder: Any) -> dict[str, int]:
    """What the configuration of a text encoder of ``encoder``'s kind says about its size."""
    kind = encoder.config.model_type
    if kind == "t5":
        layers = TEXT_LAYERS["T5-XXL"][0]
        return {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": layers}
    if kind == "gemma2":
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256}
        layers = TEXT_LAYERS["Gemma-2-2b"][0]
        return {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": layers, **heads}
    if type(encoder).__name__ == "CLIPTextModelWithProjection":
        return {**_CLIP_G, "num_hidden_layers": TEXT_LAYERS["OpenCLIP-bigG"][0]}
    return {**_CLIP_L, "num_hidden_layers": TEXT_LAYERS["CLIP-L"][0]}
