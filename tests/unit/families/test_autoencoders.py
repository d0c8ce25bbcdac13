"""How autoencoders are laid out in memory."""

from typing import Any

import pytest
import torch
from torch import nn

from kubetuner.config.sections.steps import ModelRef
from kubetuner.families import load_family
from tests.unit.families.conftest import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_pixels_are_channels_last(name: str, refs: dict[str, ModelRef], cpu: torch.device) -> None:
    family = load_family(name)
    vae: Any = family.load_vae(refs[name], cpu)
    kernels = [part.weight for part in vae.modules() if isinstance(part, nn.Conv2d)]
    wide = [kernel for kernel in kernels if kernel.shape[1] > 1 and kernel.shape[2] > 1]
    assert wide
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in wide)
    seen: list[bool] = []
    vae.encoder.conv_in.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    pixels = torch.rand(2, 3, 64, 32) * 2 - 1

    last = family.encode_pixels(vae, pixels, None)
    family.encode_moments(vae, pixels)

    assert seen == [True, True]
    plain = vae.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(last, family.encode_pixels(plain, pixels, None), rtol=0, atol=1e-5)
