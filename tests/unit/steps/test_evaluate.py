import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from kubetuner.artifacts import (
    CaptionRow,
    EvaluationArtifact,
    LatentRow,
    LatentsArtifact,
    ModelArtifact,
    TensorSpec,
    TextEmbedsArtifact,
    TextRow,
    list_files,
    read_artifact,
    verify_files,
    write_artifact,
    write_rows,
)
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.steps import CacheTextSection, EvaluateSection, ModelRef, Prompt
from kubetuner.errors import ArtifactError
from kubetuner.families import load_family
from kubetuner.families.text_encoding import encode_texts
from kubetuner.steps.evaluate import evaluate
from kubetuner.store import resolve_store
from pipelines.recipes.demo import models, shapes
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

# numpy's wish about an attribute of torch tensors, met inside diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CPU = torch.device("cpu")
DEMO = Path(models.__file__).parent
PROMPTS = ("a red ring on a white background", "a blue star on a black background")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    folder = tmp_path_factory.mktemp("base")
    write_pipeline(build_pipeline("sdxl", "unit"), folder)
    return ModelRef(family="sdxl", path=str(folder))


@pytest.fixture
def section(base: ModelRef) -> EvaluateSection:
    return EvaluateSection(
        model=base,
        model_type="full",
        eval_datasets=("rings",),
        num_eval_images=2,
        eval_timesteps=3,
        prompts=tuple(Prompt(shortname=f"p{index}", prompt=text) for index, text in enumerate(PROMPTS)),
        resolutions=((64, 64),),
        num_inference_steps=2,
        guidance=2.0,
        evaluation_type="clip",
        judge=str(DEMO / "judge"),
        mixed_precision="no",
    )


@pytest.fixture
def caches(base: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], list[Path]]:
    """Latents of three held-out and one trained picture in two folders, and embeddings of their captions."""
    monkeypatch.delenv("KUBETUNER_STORE", raising=False)
    family = load_family("sdxl")
    vae = family.load_vae(base, CPU)
    pictures = shapes.ring_eval_pictures()[:3]
    folders = [
        _write_latents(family, vae, tmp_path / "latents0", "rings", pictures[:2], (0, 2)),
        _write_latents(family, vae, tmp_path / "latents1", "rings", pictures[2:], (1, 2)),
    ]
    texts = ["", *(picture.caption for picture in pictures)]
    embeds = encode_texts(family, family.load_text_encoders(base, CPU), texts, CacheTextSection(model=base))
    folder = tmp_path / "texts"
    keys = [f"{index:064x}" for index in range(len(texts))]
    entry = resolve_store(folder).write_shard("texts", dict(zip(keys, embeds, strict=True)))
    rows = [TextRow(text=text, key=key, shard=entry.file) for text, key in zip(texts, keys, strict=True)]
    write_rows(folder, "texts.jsonl", rows)
    captions = [CaptionRow(sample=f"rings/{picture.file_name}", texts=(picture.caption,)) for picture in pictures]
    write_rows(folder, "captions.jsonl", captions)
    specs = {name: TensorSpec(dtype="float32", shape=tuple(tensor.shape)) for name, tensor in embeds[0].items()}
    write_artifact(
        folder,
        TextEmbedsArtifact(fingerprint="t", num_texts=4, encoded=4, reused=0, tensors=specs, shards=(entry,)),
    )
    return folders, [folder]


def _write_latents(
    family: object,
    vae: nn.Module,
    folder: Path,
    dataset: str,
    pictures: Sequence[shapes.Picture],
    part: tuple[int, int],
) -> Path:
    tensors, rows = {}, []
    generator = torch.Generator().manual_seed(len(pictures))
    for picture in pictures:
        key = picture.file_name.encode().hex()[:64].ljust(64, "0")
        tensors[key] = {"latents": torch.randn(4, 8, 8, generator=generator)}
    entry = resolve_store(folder).write_shard("latents", tensors)
    for key, picture in zip(tensors, pictures, strict=True):
        rows.append(
            LatentRow(
                sample=f"{dataset}/{picture.file_name}",
                dataset=dataset,
                key=key,
                shard=entry.file,
                intermediary_size=(64, 64),
                crop=(0, 0),
                target_size=(64, 64),
                bucket="1.0",
            )
        )
    write_rows(folder, "latents.jsonl", rows)
    spec = TensorSpec(dtype="float32", shape=(4, 8, 8))
    write_artifact(
        folder,
        LatentsArtifact(
            fingerprint=folder.name,
            num_samples=len(rows),
            encoded=len(rows),
            reused=0,
            tensors={"latents": spec},
            shards=(entry,),
            part=part,
        ),
    )
    return folder


def _write_model(folder: Path, base: ModelRef, model_type: str, **fields: str) -> Path:
    family = load_family("sdxl")
    folder.mkdir()
    if model_type == "full":
        write_pipeline(build_pipeline("sdxl", "unit", seed=1), folder / "pipeline")
    else:
        denoiser = family.add_adapter(family.load_denoiser(base, CPU, torch.float32), LoraSettings(rank=2, alpha=2))
        with torch.no_grad():
            for name, parameter in denoiser.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.5)
        family.save_adapter(folder, denoiser)
    losses = [{"step": step, "loss": 1 / step, "lr": 1e-3} for step in range(1, 20)]
    (folder / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in losses))
    artifact = ModelArtifact(
        fingerprint="m", family="sdxl", model_type=model_type, base_model=base.path, base_revision="", steps=19,
        first_loss=1.0, last_loss=0.05, files=list_files(folder), **fields,
    )  # fmt: skip
    write_artifact(folder, artifact)
    return folder


@pytest.mark.parametrize("model_type", ["full", "lora"])
def test_a_whole_evaluation(
    section: EvaluateSection, caches: tuple[list[Path], list[Path]], base: ModelRef, tmp_path: Path, model_type: str
) -> None:
    model = _write_model(tmp_path / "model", base, model_type)
    settings = section.model_copy(update={"model_type": model_type})

    artifact = evaluate(settings, model, *caches, tmp_path / "out")

    assert read_artifact(tmp_path / "out", EvaluationArtifact) == artifact
    verify_files(tmp_path / "out", artifact)
    assert artifact.parents == ("m", "latents0", "latents1", "t")
    assert artifact.eval_loss_before is not None
    assert artifact.eval_loss_after is not None
    assert artifact.eval_loss_before != artifact.eval_loss_after
    assert artifact.metrics["eval_loss/after"] == artifact.eval_loss_after
    assert {"eval_loss/low_noise/before", "eval_loss/dataset/rings/after", "clip/mean/after"} <= artifact.metrics.keys()
    assert {entry.path for entry in artifact.files} >= {"report.html", "summary.md"}
    for image in artifact.images:
        assert image.clip_score_before is not None
        with Image.open(tmp_path / "out" / image.before) as before, Image.open(tmp_path / "out" / image.after) as after:
            assert before.tobytes() != after.tobytes()
    html = (tmp_path / "out" / "report.html").read_text()
    assert "3 held-out samples" not in html
    assert "2 held-out samples" in html
    assert "Training loss" in html


def test_the_same_inputs_give_the_same_artifact(
    section: EvaluateSection, caches: tuple[list[Path], list[Path]], base: ModelRef, tmp_path: Path
) -> None:
    model = _write_model(tmp_path / "model", base, "full")
    first = evaluate(section, model, *caches, tmp_path / "first")
    (tmp_path / "again" / "images").mkdir(parents=True)
    (tmp_path / "again" / "images" / "left-over.png").touch()

    assert evaluate(section, model, *caches, tmp_path / "again") == first


def test_a_part_of_the_held_out_samples_that_is_missing_is_noticed(
    section: EvaluateSection, caches: tuple[list[Path], list[Path]], base: ModelRef, tmp_path: Path
) -> None:
    model = _write_model(tmp_path / "model", base, "full")
    with pytest.raises(ArtifactError, match=r"cache_vae was given as the parts 0 of 2 \(counted from 0\)"):
        evaluate(section, model, caches[0][:1], caches[1], tmp_path / "out")


def test_without_held_out_data_and_judge_the_report_says_so(
    section: EvaluateSection, caches: tuple[list[Path], list[Path]], base: ModelRef, tmp_path: Path
) -> None:
    model = _write_model(tmp_path / "model", base, "full")
    settings = section.model_copy(update={"eval_datasets": (), "evaluation_type": "none"})

    artifact = evaluate(settings, model, *caches, tmp_path / "out")

    assert (artifact.eval_loss_before, artifact.eval_loss_after, artifact.metrics) == (None, None, {})
    assert [image.clip_score_after for image in artifact.images] == [None, None]
    for name in ("report.html", "summary.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "No evaluation loss: the data file has no held-out dataset" in text
        assert "Pictures were not scored" in text


def test_a_held_out_dataset_without_pictures_and_no_prompts(
    section: EvaluateSection, caches: tuple[list[Path], list[Path]], base: ModelRef, tmp_path: Path
) -> None:
    model = _write_model(tmp_path / "model", base, "full")
    settings = section.model_copy(update={"eval_datasets": ("other",), "prompts": ()})

    artifact = evaluate(settings, model, *caches, tmp_path / "out")

    assert artifact.images == ()
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "no usable picture in other" in text
    assert "there is no validation prompt" in text


def test_a_model_of_another_family_is_refused(
    section: EvaluateSection, caches: tuple[list[Path], list[Path]], base: ModelRef, tmp_path: Path
) -> None:
    model = _write_model(tmp_path / "model", base, "lora")

    with pytest.raises(ArtifactError, match=r"is a sdxl model \(lora\), and the settings are of sdxl \(full\)"):
        evaluate(section, model, *caches, tmp_path / "out")


def test_a_damaged_model_is_refused(
    section: EvaluateSection, caches: tuple[list[Path], list[Path]], base: ModelRef, tmp_path: Path
) -> None:
    model = _write_model(tmp_path / "model", base, "full")
    (model / "pipeline" / "model_index.json").write_text("{}")

    with pytest.raises(ArtifactError, match=r"pipeline/model_index\.json"):
        evaluate(section, model, *caches, tmp_path / "out")
    assert not (tmp_path / "out" / "artifact.json").exists()


def test_a_caption_without_embedding_is_named(
    section: EvaluateSection, caches: tuple[list[Path], list[Path]], base: ModelRef, tmp_path: Path
) -> None:
    model = _write_model(tmp_path / "model", base, "full")
    write_rows(caches[1][0], "captions.jsonl", [])

    with pytest.raises(ArtifactError, match="has latents and no caption"):
        evaluate(section, model, *caches, tmp_path / "out")


def test_a_tracked_model_that_cannot_be_fetched_gives_way_to_the_folder(
    section: EvaluateSection,
    caches: tuple[list[Path], list[Path]],
    base: ModelRef,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("KUBETUNER_MLFLOW_ARTIFACTS", str(tmp_path / "mlartifacts"))
    monkeypatch.setenv("KUBETUNER_SPOOL", str(tmp_path / "spool"))
    model = _write_model(
        tmp_path / "model", base, "full", mlflow_model_uri="models:/m-00000000000000000000000000000000"
    )

    artifact = evaluate(section, model, *caches, tmp_path / "out")

    assert artifact.eval_loss_after is not None
    assert "the model folder was evaluated instead" in (tmp_path / "out" / "summary.md").read_text()
