"""Trains the demo's judge: a small CLIP that matches pictures of shapes with their captions."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel, CLIPProcessor

from pipelines.recipes.demo.shapes import Picture, old_pictures, ring_pictures, scattered
from pipelines.recipes.demo.train_autoencoder import pixels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgeRun:
    """How the judge is trained."""

    steps: int
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    versions: int = 40
    largest_noise: float = 0.15
    seed: int = 0


def train_judge(model: CLIPModel, processor: CLIPProcessor, run: JudgeRun) -> float:
    """Train in place on every caption at once; returns the share of captions that it finds."""
    torch.manual_seed(run.seed)
    known = [*old_pictures(), *ring_pictures()]
    text = processor(text=[picture.caption for picture in known], padding=True, return_tensors="pt")
    albums = _albums(known, run, processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / run.warmup_steps, (run.steps - step) / run.steps),
    )
    answers = torch.arange(len(known))
    model.train()
    for step in range(run.steps):
        images = albums[answers, torch.randint(run.versions, (len(known),))]
        noise = torch.rand(len(known), 1, 1, 1) * run.largest_noise
        images = images + noise * torch.randn_like(images)
        scores = model(pixel_values=images, **text).logits_per_image
        loss = functional.cross_entropy(scores, answers)
        loss = (loss + functional.cross_entropy(scores.T, answers)) / 2
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            logger.info("judge step %d loss %.3f", step + 1, loss.item())
    model.eval()
    return found_share(model, processor, known)


def found_share(model: CLIPModel, processor: CLIPProcessor, pictures: Sequence[Picture]) -> float:
    """How often a picture's own caption is the best match among all the captions."""
    captions = [picture.caption for picture in pictures]
    best = matches(model, processor, [picture.draw() for picture in pictures], captions).argmax(1)
    return (best == torch.arange(len(captions))).float().mean().item()


@torch.no_grad()
def matches(model: CLIPModel, processor: CLIPProcessor, images: list[Image.Image], captions: list[str]) -> Tensor:
    """Cosine of each picture (row) with each caption (column)."""
    batch = processor(text=captions, images=images, padding=True, return_tensors="pt")
    output = model(**batch)
    seen = functional.normalize(output.image_embeds, dim=-1)
    cosines: Tensor = seen @ functional.normalize(output.text_embeds, dim=-1).T
    return cosines


def _albums(known: Sequence[Picture], run: JudgeRun, processor: CLIPProcessor) -> Tensor:
    """For every caption its pictures at random sizes and places, normalised as CLIP does."""
    rng = random.Random(run.seed)
    drawn = [
        scattered(picture, rng).draw() if version else picture.draw()
        for picture in known
        for version in range(run.versions)
    ]
    settings = processor.image_processor
    mean, std = torch.tensor(settings.image_mean), torch.tensor(settings.image_std)
    images = (pixels(drawn) + 1) / 2
    images = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return images.view(len(known), run.versions, *images.shape[1:])
