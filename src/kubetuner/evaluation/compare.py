"""Examine the base and the trained model in the same way: evaluation loss and pictures."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kubetuner.artifacts import ValidationImage
from kubetuner.config.sections.objective import ProcessSettings
from kubetuner.config.sections.steps import EvaluateSection
from kubetuner.evaluation.clip_score import Judge, Pair, bar_of, verdict
from kubetuner.evaluation.eval_loss import EvalLoss, Measurement, evaluation_loss
from kubetuner.evaluation.held_out import HeldOut
from kubetuner.evaluation.pictures import Shot, draw_shots, shots_of
from kubetuner.families import Family, load_family
from kubetuner.families.quantised import round_text_encoders


@dataclass(frozen=True)
class Comparison:
    """Both models' results.

    Attributes:
        before: Evaluation loss of the base; ``None`` without held-out samples.
        after: Evaluation loss of the trained model; ``None`` without held-out samples.
        images: Pictures by both, with scores where there is a judge.
        verdicts: One per picture; empty texts without a judge.
        truncated: Prompts that the judge could not read to their end.
    """

    before: EvalLoss | None
    after: EvalLoss | None
    images: tuple[ValidationImage, ...]
    verdicts: tuple[str, ...]
    truncated: tuple[str, ...]


@dataclass(frozen=True)
class _Examiner:
    """What both models are examined with."""

    section: EvaluateSection
    family: Family
    held_out: HeldOut | None
    shots: tuple[Shot, ...]
    device: torch.device
    out: Path

    def examine(self, denoiser: nn.Module, moment: str) -> tuple[EvalLoss | None, list[str]]:
        """Evaluation loss of ``denoiser``, and the paths of its pictures."""
        denoiser.to(self.device).eval().requires_grad_(False)
        loss = None
        if self.held_out is not None:
            loss = evaluation_loss(self._measurement(), denoiser, self.held_out, moment)
        paths: list[str] = []
        if self.shots:
            pipeline = self.family.load_pipeline(self.section.model, denoiser, self.device)
            round_text_encoders(pipeline, self.section.rounding)
            paths = draw_shots(self.family, pipeline, self.shots, self.section, self.out, moment)
        return loss, paths

    def load(self, weights: Path | None) -> nn.Module:
        """The base's denoiser, or the trained one of ``weights``."""
        ref = self.section.model
        if weights is not None and self.section.model_type == "full":
            ref = ref.model_copy(update={"path": str(weights), "revision": "", "variant": ""})
        denoiser = self.family.load_denoiser(ref, self.device, torch.float32)
        if weights is not None and self.section.model_type == "lora":
            denoiser = self.family.load_adapter(denoiser, weights)
        return denoiser

    def _measurement(self) -> Measurement:
        process = self.family.noise_process(self.section.model, ProcessSettings(flow=self.section.flow))
        bf16 = self.section.mixed_precision == "bf16"
        return Measurement(self.family, process, self.section.eval_timesteps, bf16)


def compare(
    section: EvaluateSection, weights: Path, held_out: HeldOut | None, device: torch.device, out: Path
) -> Comparison:
    """Examine both models, one after the other so that only one is in memory, and score their pictures.

    Args:
        section: The evaluation's settings.
        weights: The trained pipeline (full) or adapter (lora).
        held_out: Samples for the evaluation loss.
        device: Where to compute.
        out: Pictures go to ``out/images``.
    """
    shots = shots_of(section)
    if held_out is None and not shots:
        return Comparison(None, None, (), (), ())
    examiner = _Examiner(section, load_family(section.model.family), held_out, shots, device, out)
    before, before_paths = examiner.examine(examiner.load(None), "before")
    _free(device)
    after, after_paths = examiner.examine(examiner.load(weights), "after")
    _free(device)
    images = [
        ValidationImage(
            shortname=shot.shortname,
            prompt=shot.prompt,
            seed=shot.seed,
            width=shot.width,
            height=shot.height,
            before=first,
            after=second,
        )
        for shot, first, second in zip(shots, before_paths, after_paths, strict=True)
    ]
    if section.evaluation_type != "clip" or not section.judge or not images:
        return Comparison(before, after, tuple(images), ("",) * len(images), ())
    judged, verdicts, truncated = _judge(section.judge, device, images, out)
    return Comparison(before, after, judged, verdicts, truncated)


def _judge(
    path: str, device: torch.device, images: Sequence[ValidationImage], out: Path
) -> tuple[tuple[ValidationImage, ...], tuple[str, ...], tuple[str, ...]]:
    """``images`` with scores, a verdict for each, and the prompts that the judge cut."""
    owners = [image.prompt for image in images]
    files = [out / image.before for image in images] + [out / image.after for image in images]
    table = Judge(path, device).score(files, owners)
    bar = bar_of(table, owners * 2)
    scored, verdicts = [], []
    for index, image in enumerate(images):
        pair = Pair(table.of(index, image.prompt), table.of(index + len(images), image.prompt))
        update = {"clip_score_before": round(pair.before, 4), "clip_score_after": round(pair.after, 4)}
        scored.append(image.model_copy(update=update))
        verdicts.append(verdict(pair, bar))
    return tuple(scored), tuple(verdicts), table.truncated


def _free(device: torch.device) -> None:
    """Give the first model's memory back before the second is loaded."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
