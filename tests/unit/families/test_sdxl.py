import json
import shutil
from pathlib import Path

import torch

from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.steps import CacheTextSection, ModelRef
from kubetuner.families.sdxl import Sdxl
from kubetuner.families.text_encoding import encode_texts

FAMILY = Sdxl()


def test_dropped_captions_have_no_text_and_no_sizes(
    refs: dict[str, ModelRef], rows: list[LatentRow], cpu: torch.device
) -> None:
    ref = refs["sdxl"]
    text, null = encode_texts(FAMILY, FAMILY.load_text_encoders(ref, cpu), ["a star", ""], CacheTextSection(model=ref))
    conditioning = FAMILY.collate([text, None, text], null, rows)
    assert conditioning["time_ids"].tolist() == [[80, 70, 0, 0, 64, 32], [0] * 6, [82, 72, 2, 4, 64, 32]]
    for name in ("encoder_hidden_states", "text_embeds"):
        assert not conditioning[name][1].any()
        assert conditioning[name][0].any()


def test_bases_that_encode_the_empty_prompt_keep_its_embedding(
    refs: dict[str, ModelRef], tmp_path: Path, cpu: torch.device
) -> None:
    shutil.copytree(refs["sdxl"].path, tmp_path, dirs_exist_ok=True)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}))
    ref = ModelRef(family="sdxl", path=str(tmp_path))
    (null,) = encode_texts(FAMILY, FAMILY.load_text_encoders(ref, cpu), [""], CacheTextSection(model=ref))
    assert null["embeds"].any()
    assert null["pooled"].any()


def test_long_texts_are_cut_to_77(refs: dict[str, ModelRef], cpu: torch.device) -> None:
    ref = refs["sdxl"]
    (named,) = encode_texts(
        FAMILY, FAMILY.load_text_encoders(ref, cpu), ["a star " * 100], CacheTextSection(model=ref, max_length=300)
    )
    assert len(named["embeds"]) == 77
