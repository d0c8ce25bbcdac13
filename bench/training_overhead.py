"""What our training loop costs above the least that PyTorch can cost, and how soon the first step is done.

The floor is forward, loss, backward, clipping and AdamW on batches that are already noised, and nothing else. Both run
in turns in one process on the same tensors; the figures are medians of CPU time per step, so that other load matters
little. Run ``python -m bench.training_overhead [--steps N] [--sizes unit,mid]``.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, SanaTransformer2DModel, UNet2DConditionModel
from torch import nn

from bench.fixed_batch import FixedBatch, FixedBatches
from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.objective import ProcessSettings
from kubetuner.config.sections.steps import DatasetSampling, ModelRef, TrainSection
from kubetuner.families import load_family
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.loop import Job, train_denoiser
from kubetuner.training.objective import Objective
from kubetuner.training.optimizers import make_optimizer
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

FAMILIES = ("pixart_sigma", "sdxl", "sana")
DEMO = Path("pipelines/recipes/demo")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sizes", default="unit,mid")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "size  family        type  params[M]  floor[ms]  ours[ms]  above[ms]  ratio  steps/s floor/ours  [CPU per step]"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for family in FAMILIES:
            write_pipeline(build_pipeline(family, "unit"), Path(scratch) / family)
            for size in arguments.sizes.split(","):
                for model_type in ("full", "lora"):
                    measure(family, size, model_type, arguments.steps, Path(scratch))
    print("first step of `kubetuner step train` on the demo's caches, from process start:")
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            print(f"{family:13} {seconds_to_first_step(family, Path(scratch)):6.1f} s", flush=True)


def measure(family: str, size: str, model_type: str, steps: int, scratch: Path) -> None:
    """Print one line of the table."""
    model = denoiser(family, size)
    job = make_job(family, model, model_type, steps, scratch / family, 8 if size == "unit" else 16)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    ours: list[tuple[float, float]] = []
    floor: list[tuple[float, float]] = []
    run_ours(job, min(steps, 3), scratch)
    for _ in range(3):
        floor += run_floor(job, steps // 3)
        ours += run_ours(job, steps // 3, scratch)
    (floor_cpu, floor_wall), (ours_cpu, ours_wall) = medians(floor), medians(ours)
    print(
        f"{size:5} {family:13} {model_type:5} {parameters:8.2f} {floor_cpu:10.1f} {ours_cpu:9.1f} "
        f"{ours_cpu - floor_cpu:10.1f} {ours_cpu / floor_cpu:6.3f}  {1000 / floor_wall:8.2f} {1000 / ours_wall:8.2f}",
        flush=True,
    )


def run_ours(job: Job, steps: int, scratch: Path) -> list[tuple[float, float]]:
    """(CPU, wall) milliseconds of each step but the first."""
    times: list[tuple[float, float]] = []

    def log(_values: Mapping[str, float], _step: int) -> None:
        times.append((time.process_time(), time.perf_counter()))

    shorter = Job(**{**vars(job), "total_steps": steps + 1})
    train_denoiser(shorter, Checkpoints(scratch / "checkpoints", "key", 1), log)
    return differences(times)


def run_floor(job: Job, steps: int) -> list[tuple[float, float]]:
    """The same work and nothing else."""
    parameters = list(job.trained().values())
    optimizer = make_optimizer(job.section, parameters)
    job.denoiser.train()
    question = job.question(0, 0)
    times = [(time.process_time(), time.perf_counter())]
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            prediction = job.objective.family.predict(
                job.denoiser, question.noisy.noisy_latents, question.noisy.timesteps, question.conditioning
            )
        loss = nn.functional.mse_loss(prediction.float(), question.noisy.target)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, job.section.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        times.append((time.process_time(), time.perf_counter()))
    return differences(times)[1:]


def differences(times: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Milliseconds between neighbours."""
    return [(1000 * (b[0] - a[0]), 1000 * (b[1] - a[1])) for a, b in itertools.pairwise(times)]


def medians(times: list[tuple[float, float]]) -> tuple[float, float]:
    """Median CPU and wall time."""
    return statistics.median(cpu for cpu, _ in times), statistics.median(wall for _, wall in times)


def make_job(family: str, model: nn.Module, model_type: str, steps: int, base: Path, edge: int) -> Job:
    """A job on random data: batch of 4, text of 76 tokens (SDXL: 77)."""
    ref = ModelRef.model_validate({"family": family, "path": str(base)})
    made = load_family(ref.family)
    section = TrainSection.model_validate(
        {
            "model": ref, "model_type": model_type, "datasets": (DatasetSampling(id="a"),), "max_train_steps": steps,
            "lora": LoraSettings() if model_type == "lora" else None, "resume_from_checkpoint": "",
            "checkpoint_step_interval": 0, "gradient_checkpointing": False,
        }
    )  # fmt: skip
    if section.lora is not None:
        model.to(torch.bfloat16)
        made.add_adapter(model, section.lora)
    config: Any = model.config
    width = config.cross_attention_dim if family == "sdxl" else config.caption_channels
    shapes: dict[str, tuple[int, ...]] = {"embeds": (77 if family == "sdxl" else 76, width)}
    if family == "sdxl":
        shapes["pooled"] = (config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,)
    row = LatentRow(
        sample="a/b", dataset="a", key="k", shard="s", intermediary_size=(64, 64), crop=(0, 0), target_size=(64, 64),
        bucket="1.0",
    )  # fmt: skip
    text = {name: torch.randn(shape) for name, shape in shapes.items()}
    batch = FixedBatch([row] * 4, torch.randn(4, config.in_channels, edge, edge), [text] * 4)
    objective = Objective(made, made.noise_process(ref, ProcessSettings()), text, 0, True)
    return Job(section, model, objective, FixedBatches(batch), lambda taken: taken / 10, steps, torch.device("cpu"))


def denoiser(family: str, size: str) -> nn.Module:
    """The unit pipeline's denoiser, or one of 35 to 40 million parameters."""
    if size == "unit":
        pipeline: Any = build_pipeline(family, "unit")
        model: nn.Module = pipeline.unet if family == "sdxl" else pipeline.transformer
        return model
    make: dict[str, Callable[[], nn.Module]] = {"pixart_sigma": mid_pixart, "sdxl": mid_sdxl, "sana": mid_sana}
    return make[family]()


def mid_pixart() -> nn.Module:
    """A PixArt transformer of about 36M."""
    model: nn.Module = PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=15, sample_size=16,
        patch_size=2, cross_attention_dim=384, caption_channels=512, use_additional_conditions=False,
        interpolation_scale=1, norm_elementwise_affine=False,
    )  # fmt: skip
    return model


def mid_sdxl() -> nn.Module:
    """A UNet of about 35M."""
    model: nn.Module = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 256), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(2, 4, 8), cross_attention_dim=512,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=64,
        projection_class_embeddings_input_dim=256 + 6 * 64,
    )  # fmt: skip
    return model


def mid_sana() -> nn.Module:
    """A Sana transformer of about 35M."""
    model: nn.Module = SanaTransformer2DModel(
        in_channels=32, out_channels=32, num_attention_heads=12, attention_head_dim=32, num_layers=15,
        num_cross_attention_heads=6, cross_attention_head_dim=64, cross_attention_dim=384, caption_channels=512,
        sample_size=16, patch_size=1,
    )  # fmt: skip
    return model


def seconds_to_first_step(family: str, scratch: Path) -> float:
    """Run the demo's steps up to ``train``, then time ``kubetuner step train`` from process start to its first step."""
    config = json.loads((DEMO / f"{family}.json").read_text(encoding="utf-8")) | {"max_train_steps": 1}
    config = {**config, "lr_warmup_steps": 0}
    file, sections = scratch / "config.json", scratch / "plan" / "sections.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    run_step("plan", "--in", f"config={file}", "--in", f"data={DEMO / 'multidatabackend.json'}", out=scratch / "plan")
    run_step("download_dataset", "--section", str(sections), out=scratch / "dataset")
    for step in ("cache_vae", "cache_text_embeds"):
        run_step(step, "--section", str(sections), "--in", f"dataset={scratch / 'dataset'}", out=scratch / step)
    caches = ("--in", f"latents={scratch / 'cache_vae'}", "--in", f"text_embeds={scratch / 'cache_text_embeds'}")
    started = time.perf_counter()
    with command("train", "--section", str(sections), *caches, out=scratch / "model") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("train: 1/1"):
                return time.perf_counter() - started
    raise SystemExit(f"training {family} did not reach its first step")


def run_step(*arguments: str, out: Path) -> None:
    """Run one step to its end."""
    with command(*arguments, out=out) as process:
        said = process.communicate()[1]
    if process.returncode:
        raise SystemExit(said)


def command(*arguments: str, out: Path) -> "subprocess.Popen[str]":
    """``kubetuner step`` in a fresh process."""
    whole = [str(Path(sys.executable).with_name("kubetuner")), "step", *arguments, "--out", str(out)]
    return subprocess.Popen(whole, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


if __name__ == "__main__":
    main()
