"""Makes the demo's bases, judge and pictures from nothing.

    python -m pipelines.recipes.demo.make_bases --family sana

Random initialisation, drawn pictures, no download. Takes minutes per base on one CPU core.
SDXL and PixArt Sigma share an autoencoder: ``all`` trains it once.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from pipelines.recipes.demo.models import (
    FAMILIES,
    build_judge,
    build_pipeline,
    write_judge,
    write_pipeline,
)
from pipelines.recipes.demo.scoring import Scores
from pipelines.recipes.demo.shapes import (
    Picture,
    old_pictures,
    ring_eval_pictures,
    ring_pictures,
    write_pictures,
)
from pipelines.recipes.demo.train_autoencoder import (
    AutoencoderRun,
    peak_signal_to_noise,
    set_scaling_factor,
    train_autoencoder,
)
from pipelines.recipes.demo.train_denoiser import DenoiserRun, measure, train_denoiser
from pipelines.recipes.demo.train_judge import JudgeRun, train_judge

logger = logging.getLogger("make_bases")

HERE = Path(__file__).parent
PICTURES = "pictures"
JUDGE = "judge"

AUTOENCODERS = {
    "pixart_sigma": AutoencoderRun(steps=2500),
    "sdxl": AutoencoderRun(steps=2500),
    "sana": AutoencoderRun(steps=3000),
}
DENOISERS = {
    "pixart_sigma": DenoiserRun(
        steps=3000,
        batch_size=32,
        learning_rate=3e-3,
        snr_gamma=5.0,
        guidance_scale=3.0,
        inference_steps=10,
    ),
    "sdxl": DenoiserRun(
        steps=2500,
        batch_size=32,
        learning_rate=3e-3,
        snr_gamma=5.0,
        guidance_scale=3.0,
        inference_steps=10,
    ),
    "sana": DenoiserRun(
        steps=3000,
        batch_size=16,
        learning_rate=4e-3,
        guidance_scale=3.0,
        inference_steps=10,
    ),
}


def make_base(family: str, out: Path, autoencoder: Path | None) -> None:
    """Train one base, save it, and log what it can draw."""
    started = time.process_time()
    pipeline = build_pipeline(family, "demo")
    folder = out / "bases" / family
    if autoencoder is None:
        quality = train_autoencoder(pipeline.vae, AUTOENCODERS[family])
    else:
        pipeline.vae.load_state_dict(type(pipeline.vae).from_pretrained(autoencoder).state_dict())
        set_scaling_factor(pipeline.vae)
        quality = peak_signal_to_noise(pipeline.vae, [*old_pictures(), *ring_pictures()])
    logger.info("%s autoencoder: %.1f dB", family, quality)
    train_denoiser(pipeline, family, old_pictures(), DENOISERS[family])
    write_pipeline(pipeline, folder)
    logger.info("%s: %.0f CPU seconds", family, time.process_time() - started)
    report(DiffusionPipeline.from_pretrained(folder), family)


def report(pipeline: DiffusionPipeline, family: str) -> None:
    """Log a table of what a pipeline draws for the old captions and for the new ones."""
    pipeline.set_progress_bar_config(disable=True)
    logger.info("%-12s %-8s %6s %6s %6s", "family", "captions", "exact", "colour", "shape")
    for name, pictures in (("old", old_pictures()), ("ring", ring_pictures())):
        scores = measure(pipeline, family, pictures, DENOISERS[family])
        logger.info("%-12s %-8s %s", family, name, _row(scores))


def make_judge(out: Path) -> None:
    """Train the judge and save it."""
    model, processor = build_judge()
    share = train_judge(model, processor, JudgeRun(steps=600))
    write_judge(model, processor, out / JUDGE)
    logger.info("judge finds %.0f %% of the captions", 100 * share)


def make_pictures(out: Path) -> None:
    """Draw the pictures to train and to judge with."""
    folders: dict[str, Sequence[Picture]] = {
        "ring": ring_pictures(),
        "shapes": old_pictures(),
        "ring-eval": ring_eval_pictures(),
    }
    for name, pictures in folders.items():
        write_pictures(pictures, out / "data" / name)


def _row(scores: Scores) -> str:
    return f"{scores.exact:6.2f} {scores.colour:6.2f} {scores.shape:6.2f}"


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description="Make the demo's bases from nothing.")
    parser.add_argument("--family", choices=[*FAMILIES, JUDGE, PICTURES, "all"], default="all")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--autoencoder", type=Path, help="a trained autoencoder's folder, to save the time")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    if chosen.family in ("all", PICTURES):
        make_pictures(chosen.out)
    if chosen.family in ("all", JUDGE):
        make_judge(chosen.out)
    for family in FAMILIES if chosen.family == "all" else [chosen.family]:
        if family in FAMILIES:
            shared = chosen.family == "all" and family == "sdxl"
            vae = chosen.out / "bases" / "pixart_sigma" / "vae" if shared else chosen.autoencoder
            make_base(family, chosen.out, vae)


if __name__ == "__main__":
    main()
