"""Encoding on a GPU: what is on its way there and back arrives as it was."""

import hashlib

import pytest
import torch

from kubetuner.config.sections.steps import CacheTextSection, ModelRef
from kubetuner.families import load_family
from kubetuner.families.encoding import load_encoder
from kubetuner.families.text_encoding import encode_texts
from tests.unit.training.conftest import Setup

KEYS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(10)]


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("family", ["pixart_sigma", "sdxl"])
def test_batches_in_flight_are_those_encoded_one_by_one(setup: Setup, family: str, moments: bool) -> None:
    encoder = load_encoder(ModelRef(family=family, path=str(setup.bases / family)), "bf16", 4)
    pictures = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in KEYS]
    batches = [(KEYS[at : at + 4], pictures[at : at + 4]) for at in range(0, len(KEYS), 4)]

    with torch.inference_mode():
        found = dict(encoder.encode_all(batches, moments=moments))
        expected = {
            key: tensors
            for keys, pixels in batches
            for key, tensors in zip(keys, encoder.encode(keys, pixels, moments=moments), strict=True)
        }

    assert list(found) == KEYS
    for key in KEYS:
        one, other = found[key], expected[key]
        assert one is not None
        assert other is not None
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["pixart_sigma", "sdxl", "sana"])
def test_a_text_is_encoded_alike_whatever_the_others(setup: Setup, family: str) -> None:
    ref = ModelRef.model_validate({"family": family, "path": str(setup.bases / family)})
    section = CacheTextSection(model=ref, text_encoder_batch_size=4)
    made = load_family(family)
    encoders = made.load_text_encoders(ref, torch.device("cuda"))
    texts = ["", *(f"{number} rings" + " of a very bright red" * (number % 4) for number in range(20))]

    together = encode_texts(made, encoders, texts, section)

    for text, named in zip(texts, together, strict=True):
        (alone,) = encode_texts(made, encoders, [text], section)
        assert alone.keys() == named.keys()
        assert all(torch.equal(alone[name], named[name]) for name in alone)
        assert all(tensor.device.type == "cpu" for tensor in named.values())
