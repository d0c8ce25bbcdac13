import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kubetuner.artifacts import (
    CaptionRow,
    LatentRow,
    LatentsArtifact,
    ModelArtifact,
    TextEmbedsArtifact,
    TextRow,
    read_artifact,
    verify_files,
    write_artifact,
    write_rows,
)
from kubetuner.config.compilation import CompileSettings
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.objective import EmaSettings, LossSettings, RolloutSettings, SchedulerChange
from kubetuner.config.sections.steps import (
    DatasetSampling,
    EvaluateSection,
    ModelRef,
    Prompt,
    PushSection,
    TrainSection,
)
from kubetuner.errors import ArtifactError, InputError
from kubetuner.families import load_family
from kubetuner.steps.evaluate import evaluate
from kubetuner.steps.push_to_hub import push_to_hub
from kubetuner.steps.train import train
from kubetuner.store import Store
from kubetuner.training.checkpoints import Snapshot
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

TEXT = {
    "pixart_sigma": {"embeds": (5, 16)},
    "sana": {"embeds": (5, 16)},
    "sdxl": {"embeds": (77, 32), "pooled": (16,)},
}
FAMILIES = tuple(TEXT)
PEFT_FILES = {"adapter_model.safetensors", "adapter_config.json"}
LORA_FILES = {"pytorch_lora_weights.safetensors"}
KINDS = {
    "lora": LoraSettings(rank=2, alpha=8.0),
    "dora": LoraSettings(rank=2, alpha=8.0, use_dora=True),
    "pissa": LoraSettings(rank=2, alpha=2.0, dropout=0.0, init_type="pissa"),
    "lokr": LoraSettings(algorithm="lokr", rank=10000, alpha=10000.0, factor=4, target_classes=("Attention",)),
    "loha": LoraSettings(algorithm="loha", rank=2, alpha=1.0, target_classes=("Attention",)),
}
SAMPLER = "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "KUBETUNER_STORE", "KUBETUNER_CHECKPOINTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_training_leaves_a_pipeline_and_nothing_else(tmp_path: Path, family: str) -> None:
    section = _section(tmp_path, family, model_type="full")

    artifact = train(section, *_caches(tmp_path, family), tmp_path / "out")

    assert artifact == read_artifact(tmp_path / "out", ModelArtifact)
    verify_files(tmp_path / "out", artifact)
    assert artifact.steps == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"artifact.json", "losses.jsonl", "pipeline"}
    assert "pipeline/model_index.json" in {entry.path for entry in artifact.files}


@pytest.mark.parametrize(
    ("family", "kind", "files"),
    [
        ("pixart_sigma", "lora", PEFT_FILES),
        ("sdxl", "lora", LORA_FILES),
        ("sana", "lora", LORA_FILES),
        ("sana", "dora", LORA_FILES),
        ("sdxl", "pissa", LORA_FILES),
        ("sdxl", "lokr", PEFT_FILES),
        ("sana", "lokr", PEFT_FILES),
        ("pixart_sigma", "loha", PEFT_FILES),
    ],
)
def test_lora_training_leaves_an_adapter(tmp_path: Path, family: str, kind: str, files: set[str]) -> None:
    section = _section(tmp_path, family, model_type="lora", lora=KINDS[kind])

    artifact = train(section, *_caches(tmp_path, family), tmp_path / "out")

    assert {entry.path for entry in artifact.files} == files | {"losses.jsonl"}
    verify_files(tmp_path / "out", artifact)


@pytest.mark.parametrize("family", FAMILIES)
def test_bitfit_changes_the_biases_and_saves_a_whole_pipeline(tmp_path: Path, family: str) -> None:
    section = _section(tmp_path, family, model_type="full", layer_freeze_strategy="bitfit")

    artifact = train(section, *_caches(tmp_path, family), tmp_path / "out")

    assert "pipeline/model_index.json" in {entry.path for entry in artifact.files}
    made = load_family(section.model.family)
    weights = [
        made.load_denoiser(ref, torch.device("cpu"), torch.float32).state_dict()
        for ref in (section.model, section.model.model_copy(update={"path": str(tmp_path / "out" / "pipeline")}))
    ]
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert changed
    assert all("bias" in name for name in changed)


def test_kernel_and_recomputed_blocks_reach_the_network(tmp_path: Path) -> None:
    """The same training but for rounding, by another kernel and with other activations kept."""
    caches = _caches(tmp_path, "sdxl")
    shared = {"model_type": "lora", "lora": KINDS["lora"], "mixed_precision": "no"}
    plain = train(_section(tmp_path, "sdxl", **shared), *caches, tmp_path / "plain")
    other = {"attention_mechanism": "native-math", "gradient_checkpointing_interval": 2}
    changed = train(_section(tmp_path, "sdxl", **shared, **other), *caches, tmp_path / "changed")
    assert plain.fingerprint != changed.fingerprint
    assert changed.last_loss == pytest.approx(plain.last_loss, rel=1e-4)
    with pytest.raises(InputError, match="NVIDIA GPU"):
        train(_section(tmp_path, "sdxl", attention_mechanism="native-cudnn"), *caches, tmp_path / "gpu")


def test_a_missing_compiler_is_found_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    caches = _caches(tmp_path, "sana")
    section = _section(tmp_path, "sana", compilation=CompileSettings(backend="inductor"))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match="no-such-compiler is not installed"):
        train(section, *caches, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_run_tells_its_graphs_and_its_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"model_type": "lora", "lora": KINDS["lora"], "compilation": CompileSettings(backend="eager")}
    with caplog.at_level(logging.INFO, "kubetuner"):
        artifact = train(_section(tmp_path, "sana", **settings), *_caches(tmp_path, "sana"), tmp_path / "out")

    said = re.search(r"Trained to step 3: (.*) GB peak resident memory; compiled 2 graphs for 1 shape of", caplog.text)
    assert said is not None
    assert 0.1 < float(said[1]) < 20
    assert {entry.path for entry in artifact.files} == LORA_FILES | {"losses.jsonl"}


def test_a_run_started_at_an_adapter_goes_on_from_it(tmp_path: Path) -> None:
    caches = _caches(tmp_path, "sana")
    settings = KINDS["lora"]
    train(_section(tmp_path, "sana", model_type="lora", lora=settings), *caches, tmp_path / "first")
    start = settings.model_copy(update={"init_lora": str(tmp_path / "first")})
    section = _section(tmp_path, "sana", model_type="lora", lora=start, learning_rate=1e-12)

    train(section, *caches, tmp_path / "second")

    name = "pytorch_lora_weights.safetensors"
    first, second = (load_file(tmp_path / run / name) for run in ("first", "second"))
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    assert any(bool(tensor.any()) for key, tensor in first.items() if "lora_B" in key)


@pytest.mark.parametrize("kind", ["pissa", "lokr"])
def test_a_resumed_adapter_is_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    """What an adapter starts from is drawn anew on resuming; it must be the same start."""
    settings = {"model_type": "lora", "lora": KINDS[kind], "checkpoint_step_interval": 1}
    section, caches = _section(tmp_path, "sana", **settings), _caches(tmp_path, "sana")
    whole = train(section, *caches, tmp_path / "whole")
    child = os.fork()
    if child == 0:  # Killed at the end of the second step, before the adapter is saved.
        from kubetuner.training.checkpoints import Checkpoints

        save = Checkpoints.save

        def save_and_die(self: Checkpoints, snapshot: Snapshot) -> Path:
            save(self, snapshot)
            os.kill(os.getpid(), signal.SIGKILL if snapshot.step == 2 else 0)
            return Path()

        Checkpoints.save = save_and_die  # type: ignore[method-assign]
        try:
            train(section, *caches, tmp_path / "parts")
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL

    again = train(section, *caches, tmp_path / "parts")

    assert again == whole


@pytest.mark.parametrize(
    ("family", "kind"),
    [("pixart_sigma", "dora"), ("sdxl", "dora"), ("sdxl", "lokr"), ("sana", "pissa"), ("sana", "loha")],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_the_card_says_how_to_use_each_kind(tmp_path: Path, family: str, kind: str) -> None:
    """Train, evaluate and publish; then load the published folder with the card's code."""
    section = _section(tmp_path, family, model_type="lora", lora=KINDS[kind], learning_rate=1e-2)
    train(section, *_caches(tmp_path, family), tmp_path / "out")
    shared = {"model": section.model, "model_type": "lora"}
    prompts = (Prompt(shortname="a", prompt="a red star"),)
    evaluated = evaluate(
        EvaluateSection.model_validate(
            shared | {"prompts": prompts, "resolutions": ((64, 64),), "num_inference_steps": 2}
        ),
        tmp_path / "out",
        *_caches(tmp_path, family),
        tmp_path / "evaluation",
    )
    before, after = ((tmp_path / "evaluation" / path).read_bytes() for path in
                     (evaluated.images[0].before, evaluated.images[0].after))  # fmt: skip
    assert before != after

    push_to_hub(
        PushSection.model_validate(shared | {"training": section.to_json()}),
        tmp_path / "out",
        tmp_path / "evaluation",
        tmp_path / "published",
    )

    card = (tmp_path / "published" / "hub" / "README.md").read_text()
    assert f"This is a {KINDS[kind].title} adapter for" in card
    assert f"- Adapter: {KINDS[kind].title}" in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace(f'"{family}-lora"', repr(str(tmp_path / "published" / "hub")))
    code = code.replace('"path/to/the/base/model"', repr(section.model.path))
    names: dict[str, Any] = {}
    exec(code.split("picture = ")[0], names)  # The rest draws with 20 steps and in sizes that are not tiny.
    draw = load_family(section.model.family)
    stock = draw.load_pipeline(section.model, None, torch.device("cpu")).to(torch.bfloat16)
    settings = EvaluateSection.model_validate(shared | {"num_inference_steps": 2})
    pictures = [np.asarray(draw.draw(one, "a red star", (64, 64), 1, settings)) for one in (names["pipeline"], stock)]
    assert not np.array_equal(*pictures)


def test_the_same_run_gives_the_same_bytes_wherever_it_was_interrupted(tmp_path: Path) -> None:
    section = _section(tmp_path, "sana", model_type="full", checkpoint_step_interval=1)
    caches = _caches(tmp_path, "sana")
    whole = train(section, *caches, tmp_path / "whole")
    child = os.fork()
    if child == 0:  # Killed by the interval timer, wherever training is by then.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's handler would go on with the other tests
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        train(section, *caches, tmp_path / "parts")
        os._exit(0)
    os.waitpid(child, 0)

    again = train(section, *caches, tmp_path / "parts")

    assert again == whole


def test_averages_and_a_changed_scheduler_are_in_the_exported_pipeline(tmp_path: Path) -> None:
    plain = _section(tmp_path, "sdxl", mixed_precision="no")
    change = SchedulerChange(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    section = plain.model_copy(update={"model": plain.model.model_copy(update={"scheduler": change})})
    averaged = section.model_copy(update={"ema": EmaSettings(decay=0.9)})
    caches = _caches(tmp_path, "sdxl")

    raw = train(section, *caches, tmp_path / "raw")
    artifact = train(averaged, *caches, tmp_path / "averaged")

    assert (artifact.first_loss, artifact.last_loss) == (raw.first_loss, raw.last_loss)
    assert raw.last_loss != train(plain, *caches, tmp_path / "plain").last_loss
    weights = [load_file(tmp_path / name / WEIGHTS) for name in ("base", "raw/pipeline", "averaged/pipeline")]
    moved = sum(float((raw - base).norm()) for base, raw in zip(*(w.values() for w in weights[:2]), strict=True))
    lag = sum(float((raw - mean).norm()) for raw, mean in zip(*(w.values() for w in weights[1:]), strict=True))
    assert 0 < lag < moved
    saved = json.loads((tmp_path / "averaged/pipeline/scheduler/scheduler_config.json").read_text())
    assert saved.items() >= change.settings().items()


def test_rollouts_and_the_flows_loss_reach_training_and_leave_the_sampler_alone(tmp_path: Path) -> None:
    caches = _caches(tmp_path, "sdxl")
    rollout = RolloutSettings(max_offset=3, strategy="biased_late", probability=1.0, final_probability=1.0)
    chosen = {"plain": {}, "rollout": {"rollout": rollout}, "flow": {"loss": LossSettings(diff2flow=True)}}
    losses = {
        name: train(_section(tmp_path, "sdxl", max_train_steps=1, **settings), *caches, tmp_path / name).last_loss
        for name, settings in chosen.items()
    }
    assert len(set(losses.values())) == 3
    assert losses["flow"] > losses["plain"]  # Every timestep counts more than once.
    samplers = {(tmp_path / name / SAMPLER).read_text() for name in ("rollout/pipeline", "flow/pipeline", "base")}
    assert len(samplers) == 1


def test_settings_and_inputs_decide_the_fingerprint(tmp_path: Path) -> None:
    caches = _caches(tmp_path, "sana")
    first = train(_section(tmp_path, "sana"), *caches, tmp_path / "1")
    same = train(_section(tmp_path, "sana", checkpoint_step_interval=1), *caches, tmp_path / "2")
    other = train(_section(tmp_path, "sana", seed=7), *caches, tmp_path / "3")

    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert first.parents == ("latents", "texts")
    assert first.last_loss == same.last_loss != other.last_loss


def test_mixed_precision_rounds_what_is_computed(tmp_path: Path) -> None:
    caches = _caches(tmp_path, "sana")
    exact, rounded = (
        train(_section(tmp_path, "sana", mixed_precision=chosen), *caches, tmp_path / chosen).first_loss
        for chosen in ("no", "bf16")
    )
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.05)


def test_epochs_are_turned_into_steps(tmp_path: Path) -> None:
    section = _section(tmp_path, "sana", max_train_steps=0, num_train_epochs=2, train_batch_size=2)

    assert train(section, *_caches(tmp_path, "sana"), tmp_path / "out").steps == 4


def test_a_fresh_lora_already_answers_as_its_base_on_regularisation_data(tmp_path: Path) -> None:
    lora = {"model_type": "lora", "lora": LoraSettings(rank=2), "max_train_steps": 1}
    caches = _caches(tmp_path, "sana")
    keeping = _section(tmp_path, "sana", datasets=(DatasetSampling(id="a", is_regularisation_data=True),), **lora)

    assert train(keeping, *caches, tmp_path / "1").first_loss == pytest.approx(0.0, abs=1e-6)
    assert train(_section(tmp_path, "sana", **lora), *caches, tmp_path / "2").first_loss > 0.1


def test_an_unfinished_input_is_refused(tmp_path: Path) -> None:
    latents, texts = _caches(tmp_path, "sana")
    (latents[0] / "artifact.json").unlink()

    with pytest.raises(ArtifactError, match="did not finish"):
        train(_section(tmp_path, "sana"), latents, texts, tmp_path / "out")


def _section(folder: Path, family: str, **settings: object) -> TrainSection:
    base = folder / "base"
    if not base.exists():
        write_pipeline(build_pipeline(family, "unit"), base)
    values = {
        "model": ModelRef.model_validate({"family": family, "path": str(base)}),
        "model_type": "full",
        "datasets": (DatasetSampling(id="a"),),
        "max_train_steps": 3,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
    }
    return TrainSection.model_validate(values | settings)


def _caches(folder: Path, family: str) -> tuple[list[Path], list[Path]]:
    generator = torch.Generator().manual_seed(0)
    latents, texts = folder / "latents", folder / "texts"
    keys = [f"k{index}" for index in range(4)]
    entry = Store(latents).write_shard(
        "l", {key: {"latents": torch.randn(4, 8, 8, generator=generator)} for key in keys}
    )
    rows = [
        LatentRow(
            sample=f"a/{key}.png", dataset="a", key=key, shard=entry.file, intermediary_size=(64, 64), crop=(0, 0),
            target_size=(64, 64), bucket="1.0",
        )
        for key in keys
    ]  # fmt: skip
    write_rows(latents, "latents.jsonl", rows)
    write_artifact(
        latents,
        LatentsArtifact(
            fingerprint="latents", parents=("dataset",), num_samples=4, encoded=4, reused=0, tensors={}, shards=(entry,)
        ),
    )
    captions = {text: f"t{index}" for index, text in enumerate(["", "red", "blue"])}
    embeds = {
        key: {name: torch.randn(shape, generator=generator) for name, shape in TEXT[family].items()}
        for key in captions.values()
    }
    entry = Store(texts).write_shard("t", embeds)
    write_rows(texts, "texts.jsonl", [TextRow(text=text, key=key, shard=entry.file) for text, key in captions.items()])
    write_rows(texts, "captions.jsonl", [CaptionRow(sample=row.sample, texts=("red", "blue")) for row in rows])
    write_artifact(
        texts,
        TextEmbedsArtifact(
            fingerprint="texts", parents=("dataset",), num_texts=3, encoded=3, reused=0, tensors={}, shards=(entry,)
        ),
    )
    return [latents], [texts]
