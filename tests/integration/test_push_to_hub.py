"""Publishing to a hub over HTTP, and what happens when the hub is unwell."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kubetuner.artifacts import (
    EvaluationArtifact,
    ModelArtifact,
    PublishedArtifact,
    ValidationImage,
    list_files,
    read_artifact,
    verify_files,
    write_artifact,
)
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.steps import ModelRef, ModelType, PushSection, TrainSection
from kubetuner.errors import ArtifactError, PublishError
from kubetuner.publishing import hub as publishing_hub
from kubetuner.steps.push_to_hub import push_to_hub
from tests.servers.hub import HubServer

TOKEN = "hf_alice_secret_token"
BASE = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(publishing_hub, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with HubServer({TOKEN: "alice", "hf_bob_token": "bob"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def make_model(folder: Path, model_type: ModelType) -> Path:
    weights = folder / "pytorch_lora_weights.safetensors"
    if model_type == "full":
        (folder / "pipeline" / "unet").mkdir(parents=True)
        (folder / "pipeline" / "model_index.json").write_text("{}")
        weights = folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    folder.mkdir(exist_ok=True)
    save_file({"w": torch.arange(6.0)}, weights)
    artifact = ModelArtifact(
        fingerprint="m", files=list_files(folder), family="sdxl", model_type=model_type, base_model=BASE,
        base_revision="r", steps=8, first_loss=0.5, last_loss=0.25,
    )  # fmt: skip
    (folder / "losses.jsonl").write_text("not weights\n")
    write_artifact(folder, artifact)
    return folder


def make_evaluation(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    for moment, colour in (("before", "red"), ("after", "blue")):
        Image.new("RGB", (16, 16), colour).save(folder / "images" / f"ring-{moment}.png")
    picture = ValidationImage(
        shortname="ring", prompt="a ring", seed=42, width=16, height=16,
        before="images/ring-before.png", after="images/ring-after.png",
    )  # fmt: skip
    evaluation = EvaluationArtifact(
        fingerprint="e",
        files=list_files(folder),
        eval_loss_before=0.5,
        eval_loss_after=0.25,
        metrics={},
        images=(picture,),
    )
    write_artifact(folder, evaluation)
    return folder


def section(
    model_type: ModelType = "lora", *, push: bool = True, name: str = "alice/ring", **more: object
) -> PushSection:
    ref = ModelRef(family="sdxl", path=BASE)
    lora = LoraSettings() if model_type == "lora" else None
    training = TrainSection(model=ref, model_type=model_type, lora=lora, datasets=(), max_train_steps=8).to_json()
    fields = {"push_to_hub": push, "hub_model_id": name, "training": training} | more
    return PushSection.model_validate({"model": ref, "model_type": model_type} | fields)


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path, Path]:
    return make_model(tmp_path / "model", "lora"), make_evaluation(tmp_path / "evaluation"), tmp_path / "out"


def test_adapter_card_and_pictures_arrive(hub: HubServer, inputs: tuple[Path, Path, Path]) -> None:
    published = push_to_hub(section(), *inputs)
    repo = hub.repos["alice/ring"]
    assert repo.private
    assert set(repo.files) == {
        "README.md", "pytorch_lora_weights.safetensors",
        "assets/00-ring-before.png", "assets/00-ring-after.png",
    }  # fmt: skip
    assert (
        repo.files["pytorch_lora_weights.safetensors"].content
        == (inputs[0] / "pytorch_lora_weights.safetensors").read_bytes()
    )
    assert published.commit == repo.head
    assert published.url == f"{hub.url}/alice/ring/commit/{repo.head}"
    assert repo.titles[-1] == "Trained for 8 steps"
    assert read_artifact(inputs[2], PublishedArtifact) == published
    verify_files(inputs[2], published)


def test_full_pipeline_is_at_the_root(hub: HubServer, tmp_path: Path) -> None:
    model, evaluation = make_model(tmp_path / "model", "full"), make_evaluation(tmp_path / "evaluation")
    push_to_hub(section("full", name="ring"), model, evaluation, tmp_path / "out")
    files = hub.repos["alice/ring"].files
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= set(files)


def test_commit_is_tried_again_when_the_hub_is_unwell(hub: HubServer, inputs: tuple[Path, Path, Path]) -> None:
    hub.fail("POST /api/models/alice/ring/commit/main", 503, times=2)
    published = push_to_hub(section(), *inputs)
    assert published.commit == hub.repos["alice/ring"].head
    assert sum("/commit/" in line for line in hub.requests) == 3


def test_publishing_twice_makes_one_commit(hub: HubServer, inputs: tuple[Path, Path, Path]) -> None:
    first = push_to_hub(section(), *inputs)
    again = push_to_hub(section(), *inputs)
    assert again.commit == first.commit


def test_a_hub_that_stays_down_fails_with_advice(hub: HubServer, inputs: tuple[Path, Path, Path]) -> None:
    hub.fail("POST .*/commit/", 503, times=100)
    with pytest.raises(PublishError, match=r"uploading to alice/ring failed: .* try again later"):
        push_to_hub(section(), *inputs)
    assert sum("/commit/" in line for line in hub.requests) == publishing_hub.ATTEMPTS
    assert not (inputs[2] / "artifact.json").exists()


def test_damage_on_the_way_is_noticed(hub: HubServer, inputs: tuple[Path, Path, Path]) -> None:
    hub.corrupt_lfs = True
    with pytest.raises(PublishError, match=r"differ from what was sent: .*pytorch_lora_weights\.safetensors"):
        push_to_hub(section(), *inputs)


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_wrong_token", "set HF_TOKEN"), ("hf_bob_token", "may not write there"), ("", "no Hugging Face token")],
)
def test_tokens_that_may_not_publish(
    hub: HubServer, inputs: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, token: str, message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match=message):
        push_to_hub(section(), *inputs)
    assert not hub.repos


def test_private_model_does_not_go_to_a_public_repository(hub: HubServer, inputs: tuple[Path, Path, Path]) -> None:
    repo = hub.create("alice/ring", private=False)
    with pytest.raises(PublishError, match="exists and is public"):
        push_to_hub(section(), *inputs)
    assert repo.files == {}
    push_to_hub(section(private=False), *inputs)
    assert "README.md" in repo.files


def test_a_token_in_the_note_is_not_published(hub: HubServer, inputs: tuple[Path, Path, Path]) -> None:
    with pytest.raises(PublishError, match="token or password"):
        push_to_hub(section(note=f"made with {TOKEN}"), *inputs)
    assert not hub.repos


def test_without_a_hub_the_same_folder_stays_local(hub: HubServer, inputs: tuple[Path, Path, Path]) -> None:
    published = push_to_hub(section(push=False), *inputs)
    assert hub.requests == []
    assert published.url == str(inputs[2] / "hub")
    assert published.commit == ""
    local = {
        path.relative_to(inputs[2] / "hub").as_posix() for path in (inputs[2] / "hub").rglob("*") if path.is_file()
    }
    push_to_hub(section(), *inputs)
    assert local == set(hub.repos["alice/ring"].files)


def test_damaged_model_is_refused(inputs: tuple[Path, Path, Path], hub: HubServer) -> None:
    (inputs[0] / "pytorch_lora_weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"pytorch_lora_weights\.safetensors"):
        push_to_hub(section(), *inputs)


def test_tracked_model_is_published_from_mlflow(
    hub: HubServer,
    inputs: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from kubetuner.tracking import track

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("KUBETUNER_MLFLOW_ARTIFACTS", str(tmp_path / "mlflow"))
    monkeypatch.setenv("KUBETUNER_SPOOL", str(tmp_path / "spool"))
    model = inputs[0]
    (model / "losses.jsonl").unlink()
    with track("train", {}) as run:
        uri = run.log_model(model, "ring")
    artifact = read_artifact(model, ModelArtifact).model_copy(update={"mlflow_model_uri": uri})
    (model / "pytorch_lora_weights.safetensors").unlink()  # only MLflow has it now
    write_artifact(model, artifact)
    with caplog.at_level("INFO"):
        push_to_hub(section(), *inputs)
    assert f"publishing the tracked model {uri}" in caplog.text
    assert (
        json.loads(artifact.model_dump_json())["files"][0]["sha256"]
        == hub.repos["alice/ring"].files["pytorch_lora_weights.safetensors"].sha256
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [({}, "This is a full fine-tune of"), ({"layer_freeze_strategy": "bitfit"}, "This is a fine-tune of all biases")],
)
def test_the_card_of_a_pipeline_says_what_was_trained(tmp_path: Path, more: dict[str, str], said: str) -> None:
    ref = ModelRef(family="sdxl", path=BASE)
    training = TrainSection.model_validate({"model": ref, "model_type": "full", "datasets": (), **more}).to_json()
    model = make_model(tmp_path / "model", "full")
    push_to_hub(
        section("full", push=False, training=training), model, make_evaluation(tmp_path / "e"), tmp_path / "out"
    )
    card = (tmp_path / "out" / "hub" / "README.md").read_text()
    assert said in card
    assert "StableDiffusionXLPipeline.from_pretrained(" in card
    assert "load_lora_weights" not in card
