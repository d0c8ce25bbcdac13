"""The published networks have the sizes that their authors state."""

import pytest

from kubetuner.config.models import OUTLINES
from kubetuner.config.sections.steps import ModelRef
from kubetuner.families.architectures import PUBLISHED, outline_denoiser

PUBLISHED_FLAVOURS = [(family, name) for family, outline in OUTLINES.items() for name in outline.flavours.values()]
NAMED = [*PUBLISHED_FLAVOURS, ("sana", "terminusresearch/sana-1.6b-1024px")]  # The quickstart's own.
MILLIONS = {
    "Sigma": 610.9,
    "900m": 908.4,
    "xl-base": 2567.5,
    "600M": 591.7,
    "1600M": 1604.5,
    "1.6B": 1604.6,
    "sana-1.6b": 1604.5,
    "4.8B": 4721.8,
}


@pytest.mark.parametrize(("family", "name"), NAMED)
def test_every_flavour_has_its_published_size(family: str, name: str) -> None:
    assert name in PUBLISHED
    denoiser = outline_denoiser(ModelRef.model_validate({"family": family, "path": name.upper()}))
    millions = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
    known = max((part for part in MILLIONS if part.lower() in name.lower()), key=len)
    assert millions == pytest.approx(MILLIONS[known], abs=0.1)
    assert all(parameter.is_meta for parameter in denoiser.parameters())
    outline = OUTLINES[ModelRef.model_validate({"family": family, "path": name}).family]
    billions = next(size for part, size in outline.parameters.items() if part in name.lower())
    assert billions == pytest.approx(millions / 1000, rel=0.01)
