"""Encoding on a GPU: what is on its way there and back arrives as it was."""

import hashlib

import pytest
import torch

from kubetuner.config.sections.steps import ModelRef
from kubetuner.families.encoding import load_encoder
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
