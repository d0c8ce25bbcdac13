"""How well pictures fit their prompts: CLIP scores 0..100, and a verdict that adapts to the judge's own scale.

A score is ``100 * max(cosine, 0)``. What counts as high differs from judge to judge (CLIP ViT-L gives a good picture
about 30), so verdicts use a bar half-way between what prompts get with other prompts' pictures and the best own scores.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

MIN_CONTRAST = 5.0
CLEAR_CHANGE = 2.0
_IMAGES_AT_ONCE = 16


@dataclass(frozen=True)
class ScoreTable:
    """Scores 0..100 of every picture with every distinct prompt.

    Attributes:
        prompts: Distinct prompts, in order of appearance.
        scores: ``[pictures][prompts]``.
        truncated: Prompts longer than the judge reads; only their beginning counts.
    """

    prompts: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    truncated: tuple[str, ...]

    def of(self, picture: int, prompt: str) -> float:
        """Score of one picture with one prompt."""
        return self.scores[picture][self.prompts.index(prompt)]


@dataclass(frozen=True)
class Pair:
    """One prompt's score before and after."""

    before: float
    after: float


class Judge:
    """A CLIP model that scores pictures; ``path`` is a folder or a hub id."""

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        local = Path(path).is_dir()
        self._device = device
        self._model: Any = CLIPModel.from_pretrained(path, local_files_only=local).to(device).eval()
        self._processor: Any = CLIPProcessor.from_pretrained(path, local_files_only=local)
        self._max_tokens: int = self._model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(self, pictures: Sequence[Path], prompts: Sequence[str]) -> ScoreTable:
        """Score each of ``pictures`` with each distinct one of ``prompts``."""
        distinct = tuple(dict.fromkeys(prompts))
        tokenizer = self._processor.tokenizer
        lengths = [len(tokenizer(prompt, verbose=False)["input_ids"]) for prompt in distinct]
        texts = tokenizer(
            list(distinct), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        text_embeds = _unit(self._model.get_text_features(**texts).pooler_output)
        rows: list[tuple[float, ...]] = []
        for start in range(0, len(pictures), _IMAGES_AT_ONCE):
            cosines = self._image_embeds(pictures[start : start + _IMAGES_AT_ONCE]) @ text_embeds.T
            rows.extend(tuple(row) for row in (100 * cosines.clamp(min=0)).double().cpu().tolist())
        truncated = tuple(p for p, length in zip(distinct, lengths, strict=True) if length > self._max_tokens)
        return ScoreTable(distinct, tuple(rows), truncated)

    def _image_embeds(self, paths: Sequence[Path]) -> Tensor:
        images = []
        for path in paths:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        inputs = self._processor.image_processor(images=images, return_tensors="pt").to(self._device)
        return _unit(self._model.get_image_features(**inputs).pooler_output)


def bar_of(table: ScoreTable, owners: Sequence[str]) -> float | None:
    """The score from which a picture counts as showing its prompt; ``None`` when this run's scores do not tell.

    Args:
        table: Scores of all pictures, before and after.
        owners: Each picture's own prompt.
    """
    own = [table.of(index, prompt) for index, prompt in enumerate(owners)]
    others = [
        score
        for index, prompt in enumerate(owners)
        for other, score in zip(table.prompts, table.scores[index], strict=True)
        if other != prompt
    ]
    if not others:
        return None
    floor, top = statistics.median(others), max(own)
    return (floor + top) / 2 if top - floor >= MIN_CONTRAST else None


def verdict(pair: Pair, bar: float | None) -> str:
    """What changed for one prompt, in words."""
    if bar is None:
        change = pair.after - pair.before
        if abs(change) < CLEAR_CHANGE:
            return "No clear change"
        return "Closer to its prompt" if change > 0 else "Further from its prompt"
    match pair.before >= bar, pair.after >= bar:
        case False, True:
            return "Could not draw it before, can now"
        case True, True:
            return "Could draw it before, still can"
        case True, False:
            return "Could draw it before, cannot now"
        case _:
            return "Could not draw it before, nor now"


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
