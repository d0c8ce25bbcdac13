import pytest
import torch
from diffusers import SanaPipeline

from kubetuner.config.sections.objective import FlowSchedule, ProcessSettings
from kubetuner.config.sections.steps import CacheTextSection, ModelRef
from kubetuner.families.sana import Sana
from kubetuner.families.text_encoding import encode_texts

FAMILY = Sana()
INSTRUCTION = "a picture of a drawing with the text\nthe photo in the picture: "


@pytest.mark.parametrize("instruction", ["", INSTRUCTION])
@pytest.mark.parametrize("length", [300, 24])
def test_instruction_lends_context_as_in_the_stock_pipeline(
    instruction: str, length: int, refs: dict[str, ModelRef], cpu: torch.device
) -> None:
    ref = refs["sana"]
    texts = ["", " A Red star", "a blue circle on a white background " * 9]
    section = CacheTextSection(model=ref, instruction=instruction, max_length=length)
    ours = encode_texts(FAMILY, FAMILY.load_text_encoders(ref, cpu), texts, section)
    stock = SanaPipeline.from_pretrained(ref.path)
    with torch.no_grad():
        embeds, mask, _, _ = stock.encode_prompt(
            texts,
            do_classifier_free_guidance=False,
            device=cpu,
            max_sequence_length=length,
            complex_human_instruction=instruction.split("\n") if instruction else None,
        )
    for row, named in enumerate(ours):
        torch.testing.assert_close(named["embeds"], embeds[row][mask[row].bool()], rtol=0, atol=1e-5)
        assert 0 < len(named["embeds"]) <= length


def test_no_keys_and_values_are_kept(refs: dict[str, ModelRef], cpu: torch.device) -> None:
    encoders = FAMILY.load_text_encoders(refs["sana"], cpu)
    kept: list[object] = []
    encoders.model.register_forward_hook(lambda _model, _inputs, output: kept.append(output.past_key_values))

    encode_texts(FAMILY, encoders, ["a red star"], CacheTextSection(model=refs["sana"]))

    assert kept == [None]


def test_flow_settings_are_used(refs: dict[str, ModelRef]) -> None:
    flow = FlowSchedule(density="uniform", sigmoid_scale=2.0, shift=1.5)
    process = FAMILY.noise_process(refs["sana"], ProcessSettings(flow=flow))
    assert process.schedule == flow
    assert process.auto is None
