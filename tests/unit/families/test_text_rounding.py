"""Text encoders of fewer bits."""

from pathlib import Path

import pytest
import torch

from kubetuner.config.sections.steps import CacheTextSection, EvaluateSection, ModelRef, Prompt
from kubetuner.config.text_rounding import TextRounding
from kubetuner.errors import InputError
from kubetuner.evaluation.compare import compare
from kubetuner.families import load_family
from kubetuner.families.text_encoding import encode_texts
from tests.unit.families.conftest import FAMILIES
from tests.unit.rounding import hide_libraries, quantised, quiet

PRECISIONS = {"int8-torchao": 0.05, "int8-quanto": 0.05, "nf4-bnb": 0.75}
"""With the largest relative error of an embedding; these encoders are narrow, so 4 bits are coarse."""
ENCODERS = {"pixart_sigma": 1, "sdxl": 2, "sana": 1}
TEXTS = ["a red ring", "a star and a blue square on a black background"]
pytestmark = [quantised, quiet, pytest.mark.parametrize("precision", PRECISIONS)]


@pytest.mark.parametrize("via", ["accelerator", "cpu"])
@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_are_near_the_whole_encoders(
    name: str, precision: str, via: str, refs: dict[str, ModelRef], cpu: torch.device
) -> None:
    family, section = load_family(name), CacheTextSection(model=refs[name])
    whole = encode_texts(family, family.load_text_encoders(refs[name], cpu), TEXTS, section)
    for number in range(1, ENCODERS[name] + 1):
        precisions = ["no_change"] * ENCODERS[name]
        precisions[number - 1] = precision
        rounding = TextRounding.model_validate({"precisions": precisions, "via": via})
        rounded = encode_texts(family, family.load_text_encoders(refs[name], cpu, rounding), TEXTS, section)
        for expected, got in zip(whole, rounded, strict=True):
            error = (got["embeds"] - expected["embeds"]).norm() / expected["embeds"].norm()
            assert 0 < error < PRECISIONS[precision]
            if "pooled" in got:  # SDXL's second encoder alone is pooled.
                assert torch.equal(got["pooled"], expected["pooled"]) == (number == 1)


def test_pictures_are_drawn_with_rounded_encoders(
    precision: str, refs: dict[str, ModelRef], cpu: torch.device, tmp_path: Path
) -> None:
    settings = {"prompts": (Prompt(shortname="star", prompt="a star"),), "resolutions": ((32, 32),), "guidance": 3.0}
    section = EvaluateSection(
        model=refs["sdxl"], model_type="full", num_inference_steps=2, mixed_precision="no", **settings
    )
    rounding = TextRounding(precisions=("no_change", precision))
    pictures = []
    for one in (section, section.model_copy(update={"rounding": rounding})):
        out = tmp_path / str(len(pictures))
        (image,) = compare(one, Path(refs["sdxl"].path), None, cpu, out).images
        assert (out / image.before).read_bytes() == (out / image.after).read_bytes()
        pictures.append((out / image.before).read_bytes())
    assert pictures[0] != pictures[1]


def test_a_missing_library_is_named(
    precision: str, refs: dict[str, ModelRef], cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_libraries(monkeypatch)
    rounding = TextRounding(precisions=("no_change", precision))
    with pytest.raises(InputError, match=rf"text_encoder_2_precision: {precision} needs the Python package"):
        load_family("sdxl").load_text_encoders(refs["sdxl"], cpu, rounding)
