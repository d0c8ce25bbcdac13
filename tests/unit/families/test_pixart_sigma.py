import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.objective import ProcessSettings
from kubetuner.config.sections.steps import CacheTextSection, ModelRef
from kubetuner.errors import InputError
from kubetuner.families.pixart_sigma import PixArtSigma, prepare
from kubetuner.families.text_encoding import encode_texts

FAMILY = PixArtSigma()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A Photo\nof <person> ", "a photo of person"),
        ("see https://example.com/x.png <b>a cat</b>", "see a cat"),
        ("a cat @nick #123456 1920x1080", "a cat"),
        ("red%20star", "red star"),
        ("猫", ""),
        ("cat.jpg", ""),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert prepare([text], clean=True) == [cleaned]


@given(st.text(st.sampled_from("aB%+2 0.\"'-_#@<b>&;é猫\n"), max_size=30) | st.text(max_size=30))
@example("A cat, and a dog.")
@example("100%25 red")
@example('a  cat -- "b" &amp;amp;lt;b&amp;amp;gt;')
@settings(deadline=None, max_examples=60)
def test_cleaning_is_what_the_stock_pipeline_does(text: str) -> None:
    stock = object.__new__(PixArtSigmaPipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = stock._text_preprocessing([text], clean_caption=True)
    assert prepare([text], clean=True) == expected


def test_without_cleaning_texts_are_lowered_and_stripped() -> None:
    assert prepare([" A Cat.JPG "], clean=False) == ["a cat.jpg"]


def test_long_texts_are_cut(refs: dict[str, ModelRef], cpu: torch.device) -> None:
    ref = refs["pixart_sigma"]
    encoders = FAMILY.load_text_encoders(ref, cpu)
    text = "a red circle " * 200
    for asked, kept in ((0, 300), (20, 20), (900, 300)):
        (named,) = encode_texts(FAMILY, encoders, [text], CacheTextSection(model=ref, max_length=asked))
        assert len(named["embeds"]) == kept


def test_sizes_reach_models_that_read_them(
    refs: dict[str, ModelRef], rows: list[LatentRow], tmp_path: Path, cpu: torch.device
) -> None:
    from diffusers import PixArtTransformer2DModel

    config = json.loads((Path(refs["pixart_sigma"].path) / "transformer/config.json").read_text())
    torch.manual_seed(0)
    # The size embedding is a third of the width each for height, width and aspect ratio.
    settings = config | {"use_additional_conditions": True, "num_attention_heads": 3, "cross_attention_dim": 48}
    model = PixArtTransformer2DModel.from_config(settings)
    model.save_pretrained(tmp_path / "transformer")
    denoiser = FAMILY.load_denoiser(ModelRef(family="pixart_sigma", path=str(tmp_path)), cpu, torch.float32)
    torch.nn.init.normal_(denoiser.proj_out.weight)
    null = {"embeds": torch.randn(1, config["caption_channels"])}
    conditioning = FAMILY.collate([None], null, rows[:1])
    assert conditioning["resolution"].tolist() == [[64.0, 32.0]]
    noisy, time = torch.randn(1, 4, 8, 4), torch.tensor([3])
    seen = FAMILY.predict(denoiser, noisy, time, conditioning)
    other = FAMILY.predict(denoiser, noisy, time, conditioning | {"resolution": torch.tensor([[512.0, 512.0]])})
    assert not torch.allclose(seen, other)


def test_a_scheduler_of_another_kind_is_refused(refs: dict[str, ModelRef], tmp_path: Path) -> None:
    shutil.copytree(Path(refs["sana"].path) / "scheduler", tmp_path / "scheduler")
    with pytest.raises(InputError, match="flow_prediction"):
        FAMILY.noise_process(ModelRef(family="pixart_sigma", path=str(tmp_path)), ProcessSettings())


def test_noise_process_has_the_bases_betas(refs: dict[str, ModelRef]) -> None:
    process = FAMILY.noise_process(refs["pixart_sigma"], ProcessSettings(segmented=False))
    betas = torch.linspace(1e-4, 0.02, 1000)
    torch.testing.assert_close(process.alphas_cumprod, (1 - betas).cumprod(0))
    assert not process.segmented
