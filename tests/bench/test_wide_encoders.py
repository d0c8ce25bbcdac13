"""The bench's models are as wide as the published ones: with all layers and words they have as many weights."""

from typing import Any

import pytest
import torch

from bench.cache_encoding import larger
from bench.wide_encoders import TEXT_LAYERS, autoencoder, text_sizes
from pipelines.recipes.demo.models import build_pipeline


def weights(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_autoencoders_are_whole_where_they_encode() -> None:
    with torch.device("meta"):
        kl, dc = autoencoder("sdxl"), autoencoder("sana")
        settings = {name: value for name, value in dc.config.items() if not name.startswith("_")}
        whole = type(dc)(**settings | {"decoder_layers_per_block": (3,) * 6})

    assert weights(kl) == 83_653_863
    assert weights(whole) == 312_250_275
    assert weights(whole.encoder) == weights(dc.encoder)


@pytest.mark.parametrize(
    ("family", "part", "name", "words", "published"),
    [
        ("pixart_sigma", "text_encoder", "T5-XXL", 32_128, 4_762_310_656),
        ("sdxl", "text_encoder", "CLIP-L", 49_408, 123_060_480),
        ("sdxl", "text_encoder_2", "OpenCLIP-bigG", 49_408, 694_659_840),
        ("sana", "text_encoder", "Gemma-2-2b", 256_000, 2_614_341_888),
    ],
)
def test_text_encoders_lack_layers_and_words_alone(
    family: str, part: str, name: str, words: int, published: int
) -> None:
    small: Any = getattr(build_pipeline(family, "unit"), part)
    sizes = text_sizes(small)
    layers = next(key for key in sizes if key in ("num_layers", "num_hidden_layers"))
    here, of = TEXT_LAYERS[name]
    assert sizes[layers] == here

    with torch.device("meta"):
        whole = larger(small, sizes | {layers: of, "vocab_size": words})

    assert weights(whole) == published
