import pytest

from kubetuner.config.load import load
from kubetuner.config.sections.steps import CacheTextSection, ModelRef, Sections
from kubetuner.config.text_rounding import TextRounding
from kubetuner.errors import ConfigError
from kubetuner.steps.planning.machinery import library_problems
from tests.unit.rounding import hide_libraries, quantised

DATA = [{"id": "a", "instance_data_dir": "a", "resolution": 512, "resolution_type": "pixel"}]
SDXL = {"model_type": "lora", "model_family": "sdxl", "max_train_steps": 1}


def _sections(**extra: object) -> Sections:
    return load({**SDXL, **extra}, DATA).sections


def test_numbers_are_the_familys_encoders() -> None:
    sections = _sections(
        text_encoder_2_precision="int8-quanto", quantize_via="cpu", text_encoder_3_precision="no_change"
    )
    rounding = TextRounding(precisions=("no_change", "int8-quanto"), via="cpu")
    assert sections.cache_text_embeds.rounding == sections.evaluate.rounding == rounding
    assert rounding.named() == {"text_encoder_2_precision": "int8-quanto"}
    assert [rounding.of(number) for number in (1, 2, 3)] == ["no_change", "int8-quanto", "no_change"]
    assert sections.train.quantize_via == "cpu"


@pytest.mark.parametrize(
    ("family", "number", "count"), [("sdxl", 3, "2 text encoders"), ("sana", 2, "one text encoder")]
)
def test_an_encoder_that_is_not_there_is_an_error(family: str, number: int, count: str) -> None:
    key = f"text_encoder_{number}_precision"
    with pytest.raises(ConfigError) as caught:
        _sections(**{"model_family": family, "model_type": "full", key: "nf4-bnb"})
    (problem,) = caught.value.problems
    assert (problem.where, problem.message) == (
        f"config.json.{key}",
        f"is 'nf4-bnb', but {family} has {count}; remove it.",
    )


def test_the_key_of_a_text_depends_on_the_precision_alone() -> None:
    plain = CacheTextSection(model=ModelRef(family="sdxl", path="p"))
    rounded = plain.model_copy(update={"rounding": TextRounding(precisions=("int8-quanto", "no_change"))})
    via = plain.model_copy(update={"rounding": TextRounding(precisions=("int8-quanto", "no_change"), via="cpu")})
    other = plain.model_copy(update={"rounding": TextRounding(precisions=("no_change", "int8-quanto"))})
    assert plain.encoding().keys() == {"model", "max_length", "instruction", "clean_caption", "dtype"}
    assert rounded.encoding() == via.encoding() not in (plain.encoding(), other.encoding())
    trained = _sections(), _sections(text_encoder_1_precision="nf4-bnb", quantize_via="cpu")
    assert trained[0].train.deciding() == trained[1].train.deciding()
    assert trained[0].cache_vae == trained[1].cache_vae


@quantised
def test_the_plan_misses_every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = _sections(
        base_model_precision="nf4-bnb", text_encoder_1_precision="int8-quanto", text_encoder_2_precision="int8-torchao"
    )
    train, rounding = sections.train, sections.cache_text_embeds.rounding
    assert not library_problems(train, rounding)
    hide_libraries(monkeypatch)
    assert [problem.where for problem in library_problems(train, rounding)] == [
        f"config.json.{key}" for key in ("base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision")
    ]
