import json
import os

import pytest
from PIL import Image

from kubetuner.config.compilation import CompileSettings
from kubetuner.config.sections.steps import ModelRef
from kubetuner.errors import ConfigError
from kubetuner.steps.plan import make_plan
from kubetuner.steps.planning.costs import vae_shape
from tests.unit.rounding import PRECISIONS, hide_libraries, quantised

CONFIG = {"model_type": "full", "model_family": "pixart_sigma", "train_batch_size": 2, "max_train_steps": 10}


def pictures(folder, *sizes):
    folder.mkdir(parents=True)
    for index, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / f"picture_{index}.png")
    return folder


def entry(name="a", **more):
    return {"id": name, "instance_data_dir": name, "resolution": 128, **more}


def refusal(config, data, cwd):
    with pytest.raises(ConfigError) as caught:
        make_plan(config, data, cwd=cwd)
    return {problem.where: problem.message for problem in caught.value.problems}


def test_counts_and_revisions(tmp_path) -> None:
    pictures(tmp_path / "a", (128, 128), (200, 200), (256, 128), (256, 128), (256, 128))
    pictures(tmp_path / "held", (128, 128))
    data = [entry(), entry("held", dataset_type="eval")]
    plan = make_plan(CONFIG, data, cwd=tmp_path)
    assert plan.summary["samples"] == {"a": 5, "held": 1}
    assert plan.summary["steps_per_epoch"] == 2
    assert plan.summary["epochs"] == 5
    squares, wide = 3 * 16 * 16, 3 * (192 // 8) * (64 // 8)
    assert plan.summary["latents_bytes"] == 4 * 4 * (squares + wide)
    source = plan.sections.download.datasets[0]
    assert source.instance_data_dir == str(tmp_path / "a")
    assert len(source.revision) == 64
    assert "| a | trained on | 5 | 0 | 2 |" in plan.markdown
    assert make_plan(CONFIG, data, cwd=tmp_path).sections == plan.sections
    os.utime(tmp_path / "a" / "picture_0.png", (1, 1))
    assert make_plan(CONFIG, data, cwd=tmp_path).sections.download.datasets[0].revision != source.revision


@pytest.mark.parametrize(
    ("config", "bytes_each"),
    [
        ({}, 16),
        ({"optimizer": "optimi-lion"}, 12),
        ({"use_ema": True}, 16),
        ({"use_ema": True, "ema_device": "accelerator"}, 20),
    ],
)
def test_memory_follows_the_optimizer_and_the_averages(tmp_path, config, bytes_each) -> None:
    pictures(tmp_path / "a", *[(128, 128)] * 2)
    plan = make_plan({**CONFIG, **config}, [entry()], cwd=tmp_path)
    assert plan.summary["training_memory_bytes"] == 910_000_000 * bytes_each


def test_a_changed_scheduler_survives_the_plan_where_it_is_read(tmp_path) -> None:
    pictures(tmp_path / "a", *[(128, 128)] * 2)
    sections = make_plan({**CONFIG, "prediction_type": "v_prediction"}, [entry()], cwd=tmp_path).sections
    read = (sections.train, sections.evaluate, sections.push)
    assert [one.model.scheduler.prediction_type for one in read] == ["v_prediction"] * 3
    assert sections.cache_vae.model == sections.cache_text_embeds.model != sections.train.model


def test_missing_folders_are_all_listed(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    found = refusal(CONFIG, [entry("x"), entry("y"), entry("empty")], tmp_path)
    assert list(found) == [f"multidatabackend.json[{index}].instance_data_dir" for index in range(3)]
    assert str(tmp_path / "x") in found["multidatabackend.json[0].instance_data_dir"]


def test_too_few_for_a_batch(tmp_path) -> None:
    pictures(tmp_path / "a", (128, 128), (128, 128), (256, 128))
    config = {**CONFIG, "train_batch_size": 4, "gradient_accumulation_steps": 2}
    message = refusal(config, [entry()], tmp_path)["multidatabackend.json[0].repeats"]
    assert "4 x gradient_accumulation_steps 2 = 8" in message
    assert "2 x (0 + 1) = 2, needs repeats 3" in message
    assert "set repeats to 3, or train_batch_size to 1" in message
    assert make_plan(config, [entry(repeats=3)], cwd=tmp_path).summary["steps_per_epoch"] == 2
    assert make_plan({**config, "train_batch_size": 1}, [entry()], cwd=tmp_path).summary["steps_per_epoch"] == 2


def test_all_too_small_unreadable_and_turned(tmp_path) -> None:
    folder = pictures(tmp_path / "a", (64, 64))
    (folder / "broken.png").write_bytes(b"no picture")
    found = refusal(CONFIG, [entry(minimum_image_size=128)], tmp_path)
    assert "none of its 2 pictures is usable" in found["multidatabackend.json[0]"]
    turned = pictures(tmp_path / "b", (64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("p", "q"):
        Image.new("RGB", (256, 128)).save(turned / f"{name}.jpg", exif=exif)
    plan = make_plan(CONFIG, [entry("b")], cwd=tmp_path)
    assert plan.run.data.pictures
    assert plan.summary["buckets"] == {"b": {"1.0": 1, "0.33": 2}}
    assert "left out: fills no batch" in plan.markdown


def test_missing_captions_are_listed(tmp_path) -> None:
    folder = pictures(tmp_path / "a", *[(128, 128)] * 8)
    (folder / "picture_0.txt").write_text("x")
    found = refusal(CONFIG, [entry(caption_strategy="textfile")], tmp_path)
    assert "7 of 8" in found["multidatabackend.json[0].caption_strategy"]
    assert "and 2 more" in found["multidatabackend.json[0].caption_strategy"]


def test_model_folders(tmp_path) -> None:
    pictures(tmp_path / "a", *[(128, 128)] * 2)
    base = tmp_path / "base"
    base.mkdir()
    config = {**CONFIG, "pretrained_model_name_or_path": "base"}
    assert "model_index.json" in refusal(config, [entry()], tmp_path)["config.json.pretrained_model_name_or_path"]
    (base / "model_index.json").write_text("{}")
    model = make_plan(config, [entry()], cwd=tmp_path).sections.train.model
    assert (model.path, len(model.revision)) == (str(base), 64)
    (base / "model_index.json").write_text("{ }")
    plan = make_plan(config, [entry()], cwd=tmp_path)
    assert plan.sections.evaluate.model == plan.sections.train.model
    assert plan.sections.train.model.revision != model.revision
    assert plan.sections.train.model.revision in plan.sections.push.training
    absent = {**CONFIG, "pretrained_model_name_or_path": "./absent"}
    assert "not a folder" in refusal(absent, [entry()], tmp_path)["config.json.pretrained_model_name_or_path"]
    hub = make_plan({**CONFIG, "revision": "abc"}, [entry()], cwd=tmp_path).sections.train.model
    assert (hub.path, hub.revision) == ("terminusresearch/pixart-900m-1024-ft-v0.6", "abc")


def test_alignment_fits_the_autoencoder(tmp_path) -> None:
    pictures(tmp_path / "a", *[(128, 128)] * 2)
    found = refusal({**CONFIG, "model_family": "sana"}, [entry(aspect_bucket_alignment=8)], tmp_path)
    assert "multiple of 32" in found["multidatabackend.json[0].aspect_bucket_alignment"]


def test_an_adapter_to_start_from_is_found_and_hashed(tmp_path) -> None:
    pictures(tmp_path / "a", *[(128, 128)] * 4)
    config = {**CONFIG, "model_type": "lora", "init_lora": "start"}
    assert "does not exist" in refusal(config, [entry()], tmp_path)["config.json.init_lora"]
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "adapter_model.safetensors").write_bytes(b"1")
    first = make_plan(config, [entry()], cwd=tmp_path).sections.train.lora
    assert first is not None
    assert first.init_lora == str(tmp_path / "start")
    (tmp_path / "start" / "adapter_model.safetensors").write_bytes(b"2")
    second = make_plan(config, [entry()], cwd=tmp_path).sections.train.lora
    assert second is not None
    assert first.init_lora_revision != second.init_lora_revision


def test_the_page_names_what_is_trained(tmp_path) -> None:
    pictures(tmp_path / "a", *[(128, 128)] * 4)
    lycoris = {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1}}
    for keys, said in (
        ({"layer_freeze_strategy": "bitfit"}, "biases only (BitFit)"),
        ({"model_type": "lora", "use_dora": True, "lora_rank": 4}, "DoRA of rank 4"),
        ({"model_type": "lora", **lycoris}, "LoKr of full rank"),
    ):
        assert said in make_plan({**CONFIG, **keys}, [entry()], cwd=tmp_path).markdown


def test_what_is_frozen_takes_less_memory(tmp_path) -> None:
    pictures(tmp_path / "a", *[(128, 128)] * 4)

    def memory(**keys: object) -> object:
        return make_plan({**CONFIG, **keys}, [entry()], cwd=tmp_path).summary["training_memory_bytes"]

    pissa = memory(model_type="lora", lora_init_type="pissa")
    assert memory() == 4 * memory(layer_freeze_strategy="bitfit") == 4 * pissa == 8 * memory(model_type="lora")


@pytest.mark.parametrize("mechanism", ["xformers", "flash-attn-2", "flash-attn-3"])
def test_a_missing_library_is_found_before_training(tmp_path, mechanism) -> None:
    """The test environment has none of them, and PyTorch's own kernels need none."""
    pictures(tmp_path / "a", *[(128, 128)] * 4)
    found = refusal({**CONFIG, "attention_mechanism": mechanism}, [entry()], tmp_path)
    assert "is not installed" in found["config.json.attention_mechanism"]
    train = make_plan({**CONFIG, "attention_mechanism": "native-math"}, [entry()], cwd=tmp_path).sections.train
    assert train.attention_mechanism == "native-math"


def test_a_missing_compiler_is_found_before_training(tmp_path, monkeypatch) -> None:
    pictures(tmp_path / "a", *[(128, 128)] * 4)
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = refusal({**CONFIG, "dynamo_backend": "inductor"}, [entry()], tmp_path)
    assert "needs a C++ compiler, and no-such-compiler is not installed" in found["config.json.dynamo_backend"]
    train = make_plan({**CONFIG, "dynamo_backend": "eager"}, [entry()], cwd=tmp_path).sections.train
    assert train.compilation == CompileSettings(backend="eager")


@quantised
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_rounded_base_takes_less_memory_or_misses_its_library(tmp_path, precision, monkeypatch) -> None:
    pictures(tmp_path / "a", *[(128, 128)] * 4)
    config = {**CONFIG, "model_type": "lora"}
    rounded = {**config, "base_model_precision": precision}
    plans = [make_plan(one, [entry()], cwd=tmp_path).summary["training_memory_bytes"] for one in (config, rounded)]
    assert plans[0] == plans[1] * (4 if precision == "nf4-bnb" else 2)

    hide_libraries(monkeypatch)
    found = refusal(rounded, [entry()], tmp_path)
    assert "install kubetuner[quantised]" in found["config.json.base_model_precision"]


def test_every_process_counts(tmp_path) -> None:
    pictures(tmp_path / "a", *[(128, 128)] * 24)
    alone = make_plan(CONFIG, [entry()], cwd=tmp_path)
    four = make_plan({**CONFIG, "num_train_processes": 4, "fsdp_enable": True}, [entry()], cwd=tmp_path)

    assert (alone.summary["steps_per_epoch"], four.summary["steps_per_epoch"]) == (12, 3)
    assert "| processes | one per GPU that training finds; steps and pictures below are for one |" in alone.markdown
    assert "| processes | 4, which share the weights out (FSDP2) |" in four.markdown
    assert "10 of 8 pictures; 3 per epoch" in four.markdown
    assert four.summary["training_memory_bytes"] == alone.summary["training_memory_bytes"] // 4


def test_every_machine_counts_and_must_be_reachable(tmp_path, monkeypatch) -> None:
    pictures(tmp_path / "a", *[(128, 128)] * 24)
    config = {**CONFIG, "num_train_processes": 2, "num_machines": 3}
    found = refusal(config, [entry()], tmp_path)
    assert "is 3, and KUBETUNER_TRAINJOB does not say how to reach so many" in found["config.json.num_machines"]

    monkeypatch.setenv("KUBETUNER_TRAINJOB", '{"workspace_pvc": "shared", "mount": "/shared"}')
    plan = make_plan(config, [entry()], cwd=tmp_path)
    assert plan.summary["steps_per_epoch"] == 2
    assert "| processes | 2 on each of 3 machines |" in plan.markdown
    each = make_plan({**CONFIG, "num_machines": 3}, [entry()], cwd=tmp_path).markdown
    assert "on each of 3 machines; steps and pictures below are for one on each |" in each

    few = refusal({**config, "gradient_accumulation_steps": 9}, [entry()], tmp_path)["multidatabackend.json[0].repeats"]
    assert "x num_train_processes 2 x num_machines 3 = 108 pictures" in few
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "store"))
    assert "which other pods do not see" in refusal(config, [entry()], tmp_path)["KUBETUNER_TRAINJOB"]
    monkeypatch.setenv("KUBETUNER_TRAINJOB", "{}")
    assert "workspace_pvc: field required" in refusal(CONFIG, [entry()], tmp_path)["KUBETUNER_TRAINJOB"]


def test_a_step_of_all_processes_that_has_too_few_pictures_is_refused(tmp_path) -> None:
    pictures(tmp_path / "a", *[(128, 128)] * 10)
    config = {**CONFIG, "num_train_processes": 4, "gradient_accumulation_steps": 3}

    message = refusal(config, [entry()], tmp_path)["multidatabackend.json[0].repeats"]

    assert "train_batch_size 2 x gradient_accumulation_steps 3 x num_train_processes 4 = 24 pictures" in message
    assert "set repeats to 2" in message
    assert "train_batch_size to 1 and gradient_accumulation_steps to 2" in message


@pytest.mark.parametrize("inside", ["", "vae"])
def test_the_shape_of_latents_is_that_of_another_vae_or_of_another_pipelines(tmp_path, inside) -> None:
    folder = tmp_path / "other" / inside
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"block_out_channels": [8, 8], "latent_channels": 16}))
    assert vae_shape(ModelRef(family="sdxl", path="org/base", vae_path=str(tmp_path / "other"))) == (2, 16)
