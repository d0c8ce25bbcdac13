from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from kubetuner.artifacts import LatentRow, ModelArtifact, ValidationImage
from kubetuner.config.sections.steps import CacheTextSection, EvaluateSection, ModelRef, Prompt
from kubetuner.evaluation.held_out import HeldOut, HeldOutSample
from kubetuner.families import load_family
from kubetuner.families.text_encoding import encode_texts
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    folder = tmp_path_factory.mktemp("base")
    write_pipeline(build_pipeline("pixart_sigma", "unit"), folder)
    return ModelRef(family="pixart_sigma", path=str(folder))


@pytest.fixture
def section(base: ModelRef) -> EvaluateSection:
    return EvaluateSection(
        model=base,
        model_type="full",
        eval_datasets=("rings",),
        eval_timesteps=6,
        prompts=(Prompt(shortname="a ring", prompt="a red ring"), Prompt(shortname="star", prompt="a blue star")),
        resolutions=((64, 64),),
        num_inference_steps=2,
        guidance=2.0,
        clean_caption=False,
        mixed_precision="no",
        seed=5,
    )


@pytest.fixture(scope="session")
def held_out(base: ModelRef) -> HeldOut:
    family = load_family("pixart_sigma")
    encoders = family.load_text_encoders(base, CPU)
    settings = CacheTextSection(model=base, clean_caption=False)
    null, *texts = encode_texts(family, encoders, ["", "a red ring", "a blue ring on a black background"], settings)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index, text in enumerate(texts):
        name = f"rings/{index}.png"
        row = LatentRow(
            sample=name, dataset="rings", key=f"k{index}", shard="s", intermediary_size=(64, 64), crop=(0, 0),
            target_size=(64, 64), bucket="1.0",
        )  # fmt: skip
        samples.append(HeldOutSample(row, torch.randn(4, 8, 8, generator=generator), text))
    return HeldOut(tuple(samples), null)


@pytest.fixture
def model() -> ModelArtifact:
    return ModelArtifact(
        fingerprint="f" * 64, family="pixart_sigma", model_type="full", base_model="org/base", base_revision="abc",
        steps=300, first_loss=0.5, last_loss=0.125, mlflow_run_id="run1",
    )  # fmt: skip


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[[int, int], tuple[ValidationImage, ...]]:
    """Noise pictures of ``count`` prompts: the hardest there are to compress."""

    def make(count: int, edge: int) -> tuple[ValidationImage, ...]:
        (tmp_path / "images").mkdir(exist_ok=True)
        images = []
        for index in range(count):
            paths = []
            for moment in ("before", "after"):
                path = f"images/{index}_{moment}.png"
                Image.effect_noise((edge, edge), 90).convert("RGB").save(tmp_path / path, compress_level=0)
                paths.append(path)
            images.append(
                ValidationImage(
                    shortname=f"p{index}",
                    prompt=f"prompt <{index}> | x",
                    seed=1,
                    width=edge,
                    height=edge,
                    before=paths[0],
                    after=paths[1],
                    clip_score_before=10.0,
                    clip_score_after=80.0,
                )
            )
        return tuple(images)

    return make
