"""Every key that SimpleTuner's quickstarts for the three families name: what it changes here, or why it is refused.

A key that changes a step's section reaches that step, whose own tests hold what it does there. The sections that do
*not* change are as telling: they are the steps whose results are kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from kubetuner.config.load import RunConfig, load
from kubetuner.config.sections.steps import Sections
from kubetuner.errors import ConfigError
from tests.unit.config.test_load import LOKR, PIXART, SANA, SDXL, camera, sana_data

TRAIN, ALL_CACHES = {"train", "push"}, {"cache_vae", "cache_text_embeds", "train", "evaluate", "push"}
HELD = {"train", "evaluate", "push"}
NOTHING: set[str] = set()
CHANGES: list[tuple[Mapping[str, object], str, object, set[str]]] = [
    (PIXART, "MODEL_TYPE", "lora", HELD),
    (PIXART, "MODEL_FAMILY", "sana", ALL_CACHES),
    (PIXART, "pretrained_model_name_or_path", "team/other", ALL_CACHES),
    (PIXART, "USE_BITFIT", True, TRAIN),
    (PIXART, "VALIDATION_RESOLUTION", "512x512", {"evaluate"}),
    (PIXART, "VALIDATION_GUIDANCE", 4.0, {"evaluate"}),
    (PIXART, "mixed_precision", "no", HELD),
    (SDXL, "model_flavour", "base-0.9", ALL_CACHES),
    (SDXL, "use_dora", True, TRAIN),
    (SDXL, "use_gradient_checkpointing", False, TRAIN),
    (SDXL, "learning_rate", 1e-5, TRAIN),
    (SDXL, "attention_mechanism", "xformers", TRAIN),
    (SDXL, "base_model_precision", "int8-quanto", TRAIN),
    (SDXL, "base_model_precision", "nf4-bnb", TRAIN),
    (SDXL, "optimizer", "optimi-lion", TRAIN),
    (SDXL, "optimizer", "bnb-lion8bit-paged", TRAIN),
    (SDXL, "lora_type", "lycoris", TRAIN),
    (SANA, "TRAIN_BATCH_SIZE", 6, TRAIN),
    (SANA, "GRADIENT_ACCUMULATION_STEPS", 2, TRAIN),
    (SANA, "validation_num_inference_steps", 50, {"evaluate"}),
    (SANA, "use_ema", True, TRAIN),
    (SANA, "optimizer", "optimi-adamw", TRAIN),
    (SANA, "gradient_checkpointing", False, TRAIN),
    (SANA, "gradient_checkpointing_interval", 2, TRAIN),
    (SANA, "--flow_schedule_auto_shift", True, HELD),
    (SANA, "--flow_schedule_shift", 0.1, HELD),
    (SANA, "--user_prompt_library", {"just_<token>": "a portrait of <token>"}, {"evaluate"}),
    (SANA, "vae_batch_size", 2, {"cache_vae"}),
]
WITHOUT_EFFECT = ["validation_preview", "validation_preview_steps"]
ACCEPTED = [
    ({"text_encoder_1_precision": "no_change", "text_encoder_2_precision": "no_change"}, NOTHING),
    ({"--push_to_hub": True, "hub_model_id": "team/model"}, {"push"}),
]
REFUSED = [
    ("--attention_mechanism", "sageattention", "no backward pass"),
    ("--report_to", "wandb", "tracked with MLflow"),
    ("mixed_precision", "fp16", "not available yet"),
    ("text_encoder_3_precision", "int8-quanto", "text encoder"),
    ("TRAINER_EXTRA_ARGS", "--x", "keys of their own in config.json"),
]
DATA: list[tuple[int, Mapping[str, object], set[str]]] = [
    (1, {"id": "other"}, {"download", "cache_vae", "train", "push"}),
    (1, {"disabled": True}, {"download", "cache_vae", "train", "push"}),
    (1, {"type": "gcs", "instance_data_dir": "gs://team/pictures"}, {"download"}),
    (1, {"instance_data_dir": "elsewhere"}, {"download"}),
    (1, {"dataset_type": "eval", "repeats": 0}, {"download", "train", "evaluate", "push"}),
    (1, {"caption_strategy": "textfile", "instance_prompt": None}, {"download"}),
    (1, {"instance_prompt": "another subject"}, {"download"}),
    (1, {"crop": True}, {"cache_vae"}),
    (0, {"crop_aspect": "preserve"}, {"cache_vae"}),
    (0, {"crop_style": "random"}, {"cache_vae"}),
    (1, {"resolution": 768}, {"cache_vae"}),
    (1, {"resolution_type": "pixel"}, {"cache_vae"}),
    (1, {"minimum_image_size": 600}, {"cache_vae"}),
    (0, {"maximum_image_size": 600}, {"cache_vae"}),
    (0, {"target_downsample_size": 600}, {"cache_vae"}),
    (1, {"repeats": 7}, TRAIN),
    (0, {"metadata_backend": "json"}, NOTHING),
]
KEPT_BY_CONTENT = [(0, "cache_dir_vae"), (0, "skip_file_discovery"), (3, "cache_dir"), (3, "write_batch_size")]


def name_of(value: object) -> str:
    """The same in every process: a set's own order depends on the process's hash seed."""
    return "+".join(sorted(value)) if isinstance(value, set) else str(value)[:40]


def changed(before: RunConfig, after: RunConfig) -> set[str]:
    """Names of the sections that differ."""
    return {name for name in Sections.model_fields if getattr(before.sections, name) != getattr(after.sections, name)}


def data_of(config: Mapping[str, object]) -> list[dict[str, Any]]:
    return sana_data() if config["model_family"] == "sana" else camera("quickstart")


@pytest.mark.parametrize(("base", "key", "value", "sections"), CHANGES, ids=name_of)
def test_a_key_reaches_its_steps(base: Mapping[str, Any], key: str, value: object, sections: set[str]) -> None:
    extra = LOKR if key == "lora_type" else {}
    given: dict[str, Any] = {name: old for name, old in {**base, **extra}.items() if name != key.lower()}
    assert changed(load(base, data_of(base)), load({**given, key: value}, data_of(base))) == sections


@pytest.mark.parametrize(("settings", "sections"), ACCEPTED, ids=name_of)
def test_settings_that_belong_together(settings: Mapping[str, object], sections: set[str]) -> None:
    assert changed(load(SDXL, camera("sdxl")), load({**SDXL, **settings}, camera("sdxl"))) == sections


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_a_key_without_effect_is_noted(key: str) -> None:
    value = {"validation_preview": True, "validation_preview_steps": 5}[key]
    before, after = load(SDXL, camera("sdxl")), load({**SDXL, key: value}, camera("sdxl"))
    assert changed(before, after) == NOTHING
    assert [note for note in after.notes if note not in before.notes and key.lstrip("-") in note]


@pytest.mark.parametrize(("key", "value", "reason"), REFUSED)
def test_what_is_refused_is_refused_with_its_reason(key: str, value: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load({**SDXL, key: value}, camera("sdxl"))


@pytest.mark.parametrize(("entry", "settings", "sections"), DATA, ids=name_of)
def test_a_key_of_the_data_file_reaches_its_steps(
    entry: int, settings: Mapping[str, object], sections: set[str]
) -> None:
    assert changed(load(SANA, sana_data()), load(SANA, _with(entry, settings))) == sections


@pytest.mark.parametrize(("entry", "key"), KEPT_BY_CONTENT)
def test_cache_keys_are_noted_and_change_nothing(entry: int, key: str) -> None:
    plain = load(SANA, sana_data())
    other = load(SANA, _with(entry, {key: 7 if key == "write_batch_size" else "vae"}))
    assert changed(plain, other) == NOTHING
    assert any(f"[{entry}].`{key}`" in note for note in other.notes)


def test_the_default_text_entry_may_be_another() -> None:
    second = {"id": "filtered", "dataset_type": "text_embeds", "caption_filter_list": ["arafed"]}
    one, other = ([*_with(3, {"default": first}), {**second, "default": not first}] for first in (True, False))
    assert changed(load(SANA, one), load(SANA, other)) == {"cache_text_embeds"}


def test_regularisation_data_count_for_a_lora_and_are_noted_for_a_full_model() -> None:
    plain, marked = _with(0, {"is_regularisation_data": False}), sana_data()
    assert changed(load({**SANA, "model_type": "lora"}, plain), load({**SANA, "model_type": "lora"}, marked)) == TRAIN
    assert changed(load(SANA, plain), load(SANA, marked)) == NOTHING
    assert any("is_regularisation_data" in note for note in load(SANA, marked).notes)


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [("output_dir", "/elsewhere", "output_dir"), ("--report_to", "mlflow", "report_to")],
)
def test_keys_of_the_run_itself(key: str, value: str, read: str) -> None:
    plain = {name: old for name, old in SDXL.items() if name != key}
    assert getattr(load({**plain, key: value}, camera("sdxl")), read) == value


def _with(entry: int, settings: Mapping[str, object]) -> Sequence[dict[str, Any]]:
    data = sana_data()
    data[entry] |= settings
    return data
