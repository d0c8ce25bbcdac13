import json

import pytest

from kubetuner.config.load import RunConfig, apply_overrides, load
from kubetuner.config.prompts import INSTRUCTION
from kubetuner.config.sections.steps import Prompt, Sections
from kubetuner.errors import ConfigError

PIXART = {
    "model_type": "full",
    "use_bitfit": False,
    "pretrained_model_name_or_path": "pixart-alpha/pixart-sigma-xl-2-1024-ms",
    "model_family": "pixart_sigma",
    "output_dir": "/home/user/output/models",
    "validation_resolution": "1024x1024,1280x768",
    "validation_guidance": 3.5,
}
SDXL = {
    "model_type": "lora",
    "model_family": "sdxl",
    "model_flavour": "base-1.0",
    "output_dir": "/home/user/output/models",
    "validation_resolution": "1024x1024,1280x768",
    "validation_guidance": 3.4,
    "use_gradient_checkpointing": True,
    "learning_rate": 1e-4,
}
SANA = {
    "model_type": "full",
    "model_family": "sana",
    "pretrained_model_name_or_path": "terminusresearch/sana-1.6b-1024px",
    "validation_resolution": "1024x1024,1280x768,2048x2048",
}


LOKR = {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr", "linear_dim": 8}}


def camera(family):
    return [
        {
            "id": f"pseudo-camera-10k-{family}",
            "type": "local",
            "crop": True,
            "crop_aspect": "square",
            "crop_style": "random",
            "resolution": 1.0,
            "minimum_image_size": 0.25,
            "maximum_image_size": 1.0,
            "target_downsample_size": 1.0,
            "resolution_type": "area",
            "cache_dir_vae": f"cache/vae/{family}/pseudo-camera-10k",
            "instance_data_dir": "/home/user/simpletuner/datasets/pseudo-camera-10k",
            "disabled": False,
            "skip_file_discovery": "",
            "caption_strategy": "filename",
            "metadata_backend": "discovery",
        },
        texts(f"cache/text/{family}/pseudo-camera-10k"),
    ]


def texts(cache_dir="cache/text", **more):
    return {
        "id": "text-embeds",
        "type": "local",
        "dataset_type": "text_embeds",
        "default": True,
        "cache_dir": cache_dir,
        "disabled": False,
        "write_batch_size": 128,
        **more,
    }


def subject(name, edge):
    return {
        "id": name,
        "type": "local",
        "crop": False,
        "resolution": edge,
        "minimum_image_size": edge,
        "maximum_image_size": edge,
        "target_downsample_size": edge,
        "resolution_type": "pixel_area",
        "cache_dir_vae": f"cache/vae/sana/{name}",
        "instance_data_dir": "datasets/dreambooth-subject",
        "caption_strategy": "instanceprompt",
        "instance_prompt": "the name of your subject goes here",
        "metadata_backend": "discovery",
        "repeats": 1000,
    }


def sana_data():
    return [
        {
            "id": "pseudo-camera-10k-sana",
            "type": "local",
            "crop": True,
            "crop_aspect": "square",
            "crop_style": "center",
            "resolution": 512,
            "minimum_image_size": 512,
            "maximum_image_size": 512,
            "target_downsample_size": 512,
            "resolution_type": "pixel_area",
            "cache_dir_vae": "cache/vae/sana/pseudo-camera-10k",
            "instance_data_dir": "datasets/pseudo-camera-10k",
            "disabled": False,
            "skip_file_discovery": "",
            "caption_strategy": "filename",
            "metadata_backend": "discovery",
            "repeats": 0,
            "is_regularisation_data": True,
        },
        subject("dreambooth-subject", 1024),
        subject("dreambooth-subject-512", 512),
        texts("cache/text/sana"),
    ]


def problems_of(config, data):
    with pytest.raises(ConfigError) as caught:
        load(config, data)
    return {problem.where: problem.message for problem in caught.value.problems}


def test_pixart_quickstart() -> None:
    run = load(PIXART, camera("pixart"))
    assert isinstance(run, RunConfig)
    train = run.sections.train
    assert train.model.path == "pixart-alpha/pixart-sigma-xl-2-1024-ms"
    assert (train.model_type, train.lora, train.optimizer) == ("full", None, "torch-adamw")
    assert (train.max_grad_norm, train.grad_clip_method) == (0.01, "norm")
    assert (train.num_train_epochs, train.max_train_steps) == (1, 0)
    assert run.sections.evaluate.resolutions == ((1024, 1024), (1280, 768))
    assert run.sections.evaluate.guidance == 3.5
    geometry = run.sections.cache_vae.datasets[0].geometry
    assert (geometry.resolution, geometry.resolution_type, geometry.crop) == (1.0, "area", True)
    assert run.output_dir == "/home/user/output/models"
    assert any("cache_dir_vae" in note for note in run.notes)
    assert Sections.from_json(run.sections.to_json()) == run.sections


def test_sdxl_quickstart() -> None:
    train = load(SDXL, camera("sdxl")).sections.train
    assert train.model.path == "stabilityai/stable-diffusion-xl-base-1.0"
    assert train.lora is not None
    assert (train.lora.rank, train.lora.alpha) == (16, 16.0)
    assert (train.learning_rate, train.gradient_checkpointing, train.max_grad_norm) == (1e-4, True, 2.0)


def test_sana_quickstart() -> None:
    run = load(SANA, sana_data())
    assert [one.repeats for one in run.sections.train.datasets] == [0, 1000, 1000]
    assert run.sections.cache_vae.datasets[0].geometry.crop_style == "center"
    assert run.sections.download.datasets[1].instance_prompt == ("the name of your subject goes here",)
    assert run.sections.cache_text_embeds.instruction == INSTRUCTION
    assert any("is_regularisation_data" in note for note in run.notes)


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("--learning_rate", 1e-5, lambda train: train.learning_rate == 1e-5),
        ("LEARNING_RATE", 1e-5, lambda train: train.learning_rate == 1e-5),
        ("MAX_NUM_STEPS", 30, lambda train: (train.max_train_steps, train.num_train_epochs) == (30, 0)),
        ("checkpointing_steps", 7, lambda train: train.checkpoint_step_interval == 7),
        ("train_batch_size", 2.0, lambda train: train.train_batch_size == 2),
        ("use_gradient_checkpointing", False, lambda train: not train.gradient_checkpointing),
        ("optimizer", "adamw", lambda train: train.optimizer == "torch-adamw"),
        ("max_grad_norm", 1.5, lambda train: train.max_grad_norm == 1.5),
        ("train_batch_size", "{env:KT_BATCH}", lambda train: train.train_batch_size == 3),
        ("snr_gamma", 0, lambda train: True),
        ("use_ema", False, lambda train: True),
        ("base_model_precision", "no_change", lambda train: True),
        ("attention_mechanism", "diffusers", lambda train: True),
        ("gradient_checkpointing_interval", 1.0, lambda train: True),
        ("use_dora", None, lambda train: True),
    ],
)
def test_accepted_keys(key, value, read, monkeypatch) -> None:
    monkeypatch.setenv("KT_BATCH", "3")
    assert read(load({**PIXART, key: value}, camera("pixart")).sections.train)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lerning_rate", 1e-4, "did you mean 'learning_rate'"),
        ("qqqqqqqq", 1, "not a known key"),
        ("use_gradient_checkpointing", "False", "expected true or false, without quotes"),
        ("train_batch_size", "4", "whole number at least 1, without quotes"),
        ("train_batch_size", 1.5, "whole number"),
        ("train_batch_size", True, "whole number"),
        ("train_batch_size", 0, "at least 1"),
        ("learning_rate", float("nan"), "a number above 0"),
        ("caption_dropout_probability", 1.5, "at most 1"),
        ("use_bitfit", 1, "expected 'none' or 'bitfit'"),
        ("use_bitfit", "False", "expected 'none' or 'bitfit'"),
        ("use_ema", "False", "expected true or false"),
        ("base_model_precision", "int8-quanto", "model_type full trains and saves the very weights"),
        ("base_model_precision", "int4-quanto", "not available yet"),
        ("base_model_precision", "fp8-quanto", "SimpleTuner refuses it"),
        ("text_encoder_1_precision", "int4-quanto", "not available yet"),
        ("text_encoder_2_precision", "int8-quanto", "pixart_sigma has one text encoder; remove it"),
        ("quantize_via", "pipeline", "not available yet"),
        ("optimizer", "adamw_bf16", "not available yet"),
        ("optimizer", "nonsense", "expected 'torch-adamw' or 'torch-adafactor'"),
        ("use_dora", True, "no effect with model_type full"),
        ("noise_offset", 0.2, "needs offset_noise"),
        ("validation_preview", "yes", "expected true or false"),
        ("attention_mechanism", "sageattention", "no backward pass"),
        ("attention_mechanism", "flex", "not available yet"),
        ("text_cache_disable", True, "Captions are encoded once"),
        ("delete_unwanted_images", True, "never deletes a picture"),
        ("gradient_checkpointing_interval", 0, "at least 1"),
        ("report_to", "wandb", "tracked with MLflow"),
        ("mixed_precision", "fp16", "not available yet"),
        ("validation_steps", 100, "not available yet"),
        ("hub_token", "x", "HF_TOKEN"),
        ("deepspeed_config", "x", "Remove the key"),
        ("model_type", None, "is null"),
        ("output_dir", "{env:KT_NOT_SET}", "not set"),
        ("lora_rank", 8, "no effect with model_type full"),
        ("flow_schedule_shift", 3, "no effect with model_family pixart_sigma"),
        ("tokenizer_max_length", 400, "300"),
        ("model_flavour", "900M", "expected one of"),
        ("model_flavour", "600M-512", "keep one"),
        ("model_flavour", "900M-1024-v0.7-stage1", "not available yet"),
        ("validation_resolution", "big", "expected an edge"),
        ("validation_resolution", "1000x1024", "nearest is 992x1024"),
        ("lr_end", 1e-8, "no effect with lr_scheduler"),
        ("adam_beta1", 1, "below 1"),
        ("eval_dataset_id", "x", "dataset_type eval"),
        ("hub_model_id", "a/b/c", "namespace/name"),
        ("user_prompt_library", "missing.json", "cannot be read"),
        ("aspect_bucket_alignment", 9.5, "whole number"),
    ],
)
def test_refused_keys(key, value, message) -> None:
    found = problems_of({**PIXART, key: value}, camera("pixart"))
    assert list(found) == [f"config.json.{key}"]
    assert message in found[f"config.json.{key}"]


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ({"max_train_steps": 5, "num_train_epochs": 1}, "max_train_steps"),
        ({"max_train_steps": 0, "num_train_epochs": 0}, "max_train_steps"),
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"max_train_steps": 5, "lr_warmup_steps": 6}, "lr_warmup_steps"),
        ({"lr_scheduler": "polynomial", "lr_end": 4e-7}, "lr_end"),
        ({"gradient_checkpointing": False, "gradient_checkpointing_interval": 2}, "gradient_checkpointing_interval"),
        ({"attention_mechanism": "flash-attn-2", "mixed_precision": "no"}, "attention_mechanism"),
        ({"push_to_hub": True}, "hub_model_id"),
        ({"evaluation_type": "clip"}, "evaluation_type"),
        ({"pretrained_evaluation_model_name_or_path": "x"}, "pretrained_evaluation_model_name_or_path"),
        ({"--output_dir": "x"}, "--output_dir"),
        ({"validation_prompt": "x", "user_prompt_library": {"validation": "y"}}, "validation_prompt"),
    ],
)
def test_keys_that_disagree(extra, where) -> None:
    assert list(problems_of({**PIXART, **extra}, camera("pixart"))) == [f"config.json.{where}"]


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ({"lora_type": "lycoris"}, "lycoris_config"),
        ({"lycoris_config": {"algo": "lokr"}}, "lycoris_config"),
        ({"tokenizer_max_length": 77}, "tokenizer_max_length"),
        ({"lora_init_type": "loftq"}, "lora_init_type"),
        ({"lora_init_type": "pissa", "use_dora": True}, "lora_init_type"),
        ({"lora_init_type": "pissa", "init_lora": "x"}, "lora_init_type"),
        ({"layer_freeze_strategy": "bitfit"}, "layer_freeze_strategy"),
        ({"base_model_precision": "int8-torchao", "use_dora": True}, "base_model_precision"),
        ({"base_model_precision": "int8-torchao", "lora_init_type": "olora"}, "base_model_precision"),
        ({"base_model_precision": "nf4-bnb", **LOKR}, "base_model_precision"),
    ],
)
def test_lora_refusals(extra, where) -> None:
    assert list(problems_of({**SDXL, **extra}, camera("sdxl"))) == [f"config.json.{where}"]


def test_a_kernel_that_sana_would_not_use_is_refused() -> None:
    found = problems_of({**SANA, "attention_mechanism": "flash-attn-2"}, sana_data())
    assert "self-attention is linear" in found["config.json.attention_mechanism"]


def test_all_problems_at_once() -> None:
    data = camera("pixart")
    data[0] |= {"crop": "False", "resolution": 1024}
    data.append({"id": "text-embeds", "dataset_type": "aws_thing"})
    found = problems_of({"model_type": "fulll", "webhook_config": "x", "lerning_rate": 1}, data)
    assert set(found) == {
        "config.json.model_type",
        "config.json.model_family",
        "config.json.webhook_config",
        "config.json.lerning_rate",
        "multidatabackend.json[0].crop",
        "multidatabackend.json[0].resolution",
        "multidatabackend.json[2].id",
        "multidatabackend.json[2].dataset_type",
        "multidatabackend.json[2].instance_data_dir",
    }


def test_prompts(tmp_path) -> None:
    (tmp_path / "library.json").write_text(json.dumps({"anime_<token>": "a portrait", "man": "a man"}))
    config = {**PIXART, "--user_prompt_library": "library.json", "validation_prompt": "main", "seed": 7}
    run = load(config, camera("pixart"), cwd=tmp_path)
    expected = (
        Prompt(shortname="anime_<token>", prompt="a portrait"),
        Prompt(shortname="man", prompt="a man"),
        Prompt(shortname="validation", prompt="main"),
    )
    assert run.sections.evaluate.prompts == expected
    assert (run.sections.evaluate.seed, run.sections.train.seed) == (7, 7)


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"a/b": "x"}'])
def test_bad_prompt_library(text, tmp_path) -> None:
    (tmp_path / "library.json").write_text(text)
    with pytest.raises(ConfigError, match="user_prompt_library"):
        load({**PIXART, "user_prompt_library": "library.json"}, camera("pixart"), cwd=tmp_path)


def test_instruction_sources(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("from a file\n")
    for given, expected in (("", ""), (["a", "b"], "a\nb"), ("text.txt", "from a file"), ("words", "words")):
        run = load({**SANA, "sana_complex_human_instruction": given}, sana_data(), cwd=tmp_path)
        assert run.sections.evaluate.instruction == expected


def test_data_file_is_read_from_the_config(tmp_path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(camera("pixart")))
    assert load({**PIXART, "data_backend_config": "data.json"}, cwd=tmp_path).data.pictures
    for given in ("absent.json", ""):
        with pytest.raises(ConfigError, match="data_backend_config"):
            load({**PIXART, "data_backend_config": given}, cwd=tmp_path)


def test_overrides() -> None:
    changed = apply_overrides(
        {"--LEARNING_RATE": 1, "checkpointing_steps": 3},
        ["learning_rate=1e-5", "validation_prompt=a = b", "checkpoint_step_interval=4", "push_to_hub=true"],
    )
    assert changed == {
        "learning_rate": 1e-5,
        "validation_prompt": "a = b",
        "checkpoint_step_interval": 4,
        "push_to_hub": True,
    }
    with pytest.raises(ConfigError, match="expected key=value"):
        apply_overrides({}, ["learning_rate"])
