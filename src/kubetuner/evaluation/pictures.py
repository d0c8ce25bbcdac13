"""Validation pictures: every prompt at every resolution with the same seeds, by the base and by the trained model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kubetuner.config.sections.steps import EvaluateSection
from kubetuner.families.base import Family
from kubetuner.progress import Progress

IMAGE_FOLDER = "images"


@dataclass(frozen=True)
class Shot:
    """One picture to draw; ``stem`` begins its file name."""

    shortname: str
    prompt: str
    seed: int
    width: int
    height: int
    stem: str


def shots_of(section: EvaluateSection) -> tuple[Shot, ...]:
    """What to draw: prompt by prompt, resolution by resolution, with consecutive seeds."""
    return tuple(
        Shot(
            prompt.shortname,
            prompt.prompt,
            section.seed + offset,
            width,
            height,
            f"{index:02d}_{_slug(prompt.shortname)}_{width}x{height}_{section.seed + offset}",
        )
        for index, prompt in enumerate(section.prompts, 1)
        for width, height in section.resolutions
        for offset in range(section.num_validation_images)
    )


def draw_shots(
    family: Family, pipeline: Any, shots: Sequence[Shot], section: EvaluateSection, out: Path, moment: str
) -> list[str]:
    """Draw ``shots`` as PNG below ``out/images``.

    Returns:
        One path per shot, relative to ``out``; it ends with ``moment`` (``before`` or ``after``).
    """
    (out / IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
    paths = []
    with Progress(f"pictures {moment}", len(shots), "pictures") as progress, torch.no_grad():
        for shot in shots:
            picture = family.draw(pipeline, shot.prompt, (shot.width, shot.height), shot.seed, section)
            path = f"{IMAGE_FOLDER}/{shot.stem}_{moment}.png"
            picture.save(out / path)
            paths.append(path)
            progress.advance(note=shot.shortname)
    return paths


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-")[:60] or "prompt"
