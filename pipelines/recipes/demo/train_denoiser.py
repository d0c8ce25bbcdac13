"""Trains a demo denoiser on captioned pictures, with each family's own noise and text path."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from pipelines.recipes.demo.scoring import Scores, score_pictures
from pipelines.recipes.demo.shapes import PIXELS, Picture
from pipelines.recipes.demo.train_autoencoder import encode, pixels

logger = logging.getLogger(__name__)

MAX_TOKENS = 300
"""Text length of PixArt Sigma and Sana. Padding is masked, so trimmed text gives the same."""
_SAMPLES_AT_ONCE = 16


@dataclass(frozen=True)
class DenoiserRun:
    """How a base is trained, and how its pictures are drawn."""

    steps: int
    batch_size: int
    learning_rate: float
    guidance_scale: float
    inference_steps: int
    warmup_steps: int = 50
    caption_dropout: float = 0.1
    snr_gamma: float | None = None
    average_decay: float = 0.99
    seed: int = 0


@dataclass(frozen=True)
class Examples:
    """Everything a training step needs; the last row of each text tensor is the empty caption."""

    latents: Tensor
    text: dict[str, Tensor]

    def batch(self, run: DenoiserRun) -> tuple[Tensor, dict[str, Tensor]]:
        """Random latents, some of them with the empty caption."""
        rows = torch.randint(len(self.latents), (run.batch_size,))
        dropped = torch.rand(run.batch_size) < run.caption_dropout
        captions = rows.masked_fill(dropped, len(self.latents))
        return self.latents[rows], {name: rowed[captions] for name, rowed in self.text.items()}


Loss = Callable[[nn.Module, Tensor, dict[str, Tensor]], Tensor]


def denoiser_of(pipeline: DiffusionPipeline) -> nn.Module:
    """The network that training changes."""
    model: nn.Module = pipeline.unet if "unet" in pipeline.components else pipeline.transformer
    return model


@torch.no_grad()
def examples_of(pipeline: DiffusionPipeline, family: str, pictures: Sequence[Picture]) -> Examples:
    """Latents and embeddings of captioned pictures."""
    images = pixels([picture.draw() for picture in pictures])
    latents = encode(pipeline.vae, images) * pipeline.vae.config.scaling_factor
    return Examples(latents, text_of(pipeline, family, [picture.caption for picture in pictures]))


@torch.no_grad()
def text_of(pipeline: DiffusionPipeline, family: str, captions: list[str]) -> dict[str, Tensor]:
    """Embeddings of the captions and, as the last row, of the empty one."""
    if family == "sdxl":
        states, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
        empty = pipeline.config.force_zeros_for_empty_prompt
        assert empty, "SDXL draws without a caption from zeros"
        return {
            "states": functional.pad(states, (0, 0, 0, 0, 0, 1)),
            "pooled": functional.pad(pooled, (0, 0, 0, 1)),
        }
    options = {"complex_human_instruction": None} if family == "sana" else {}
    states, mask, _, _ = pipeline.encode_prompt(
        [*captions, ""],
        do_classifier_free_guidance=False,
        clean_caption=False,
        max_sequence_length=MAX_TOKENS,
        **options,
    )
    longest = int(mask.sum(1).max())
    return {"states": states[:, :longest], "mask": mask[:, :longest]}


def loss_of(pipeline: DiffusionPipeline, family: str, snr_gamma: float | None) -> Loss:
    """The family's objective: noise prediction, or the velocity of a straight flow."""
    if family == "sana":
        shift = float(pipeline.scheduler.config.flow_shift)
        return lambda model, latents, text: _flow_loss(model, latents, text, shift)
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    noising = DDPMScheduler.from_config({name: pipeline.scheduler.config[name] for name in names})
    predict = _predict_sdxl if family == "sdxl" else _predict_pixart

    def noise_loss(model: nn.Module, latents: Tensor, text: dict[str, Tensor]) -> Tensor:
        steps = torch.randint(noising.config.num_train_timesteps, (len(latents),))
        noise = torch.randn_like(latents)
        predicted = predict(model, noising.add_noise(latents, noise, steps), steps, text)
        errors = functional.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))
        if snr_gamma is not None:
            kept = noising.alphas_cumprod[steps]
            signal_to_noise = kept / (1 - kept)
            errors = errors * signal_to_noise.clamp(max=snr_gamma) / signal_to_noise
        return errors.mean()

    return noise_loss


def _flow_loss(model: nn.Module, latents: Tensor, text: dict[str, Tensor], shift: float) -> Tensor:
    noise = torch.randn_like(latents)
    even = torch.randn(len(latents)).sigmoid()
    sigmas = shift * even / (1 + (shift - 1) * even)
    weight = sigmas.view(-1, 1, 1, 1)
    predicted = model(
        (1 - weight) * latents + weight * noise,
        encoder_hidden_states=text["states"],
        encoder_attention_mask=text["mask"],
        timestep=sigmas * 1000,
        return_dict=False,
    )[0]
    return functional.mse_loss(predicted, noise - latents)


def _predict_pixart(model: nn.Module, noisy: Tensor, steps: Tensor, text: dict[str, Tensor]) -> Tensor:
    predicted: Tensor = model(
        noisy,
        encoder_hidden_states=text["states"],
        encoder_attention_mask=text["mask"],
        timestep=steps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return predicted.chunk(2, dim=1)[0]


def _predict_sdxl(model: nn.Module, noisy: Tensor, steps: Tensor, text: dict[str, Tensor]) -> Tensor:
    sizes = torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]], dtype=noisy.dtype)
    predicted: Tensor = model(
        noisy,
        steps,
        encoder_hidden_states=text["states"],
        added_cond_kwargs={"text_embeds": text["pooled"], "time_ids": sizes.repeat(len(noisy), 1)},
        return_dict=False,
    )[0]
    return predicted


def train_denoiser(pipeline: DiffusionPipeline, family: str, pictures: Sequence[Picture], run: DenoiserRun) -> None:
    """Train in place; the pipeline ends up with the running average of the weights."""
    torch.manual_seed(run.seed)
    examples = examples_of(pipeline, family, pictures)
    loss_function = loss_of(pipeline, family, run.snr_gamma)
    model = denoiser_of(pipeline).train()
    average = AveragedModel(model, avg_fn=_averaging(run.average_decay))
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / run.warmup_steps, (run.steps - step) / run.steps),
    )
    started, recent = time.process_time(), 0.0
    for step in range(run.steps):
        loss = loss_function(model, *examples.batch(run))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        recent = 0.99 * recent + 0.01 * loss.item() if step else loss.item()
        if step % 250 == 249:
            seconds = time.process_time() - started
            logger.info("%s step %d loss %.4f %.0f CPU s", family, step + 1, recent, seconds)
    model.load_state_dict(average.module.state_dict())
    model.eval()


def _averaging(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """A moving average that starts short, so that it forgets the random start."""

    def average(old: Tensor, new: Tensor, updates: Tensor | int) -> Tensor:
        count = float(updates)
        return old.lerp(new, 1 - min(decay, (1 + count) / (10 + count)))

    return average


@torch.no_grad()
def draw(pipeline: DiffusionPipeline, family: str, captions: Sequence[str], run: DenoiserRun) -> list[Image.Image]:
    """Draw each caption with the stock pipeline and a fixed seed."""
    options: dict[str, bool | None] = (
        {} if family == "sdxl" else {"use_resolution_binning": False, "clean_caption": False}
    )
    if family == "sana":
        options["complex_human_instruction"] = None
    images: list[Image.Image] = []
    for first in range(0, len(captions), _SAMPLES_AT_ONCE):
        images += pipeline(
            list(captions[first : first + _SAMPLES_AT_ONCE]),
            height=PIXELS,
            width=PIXELS,
            guidance_scale=run.guidance_scale,
            num_inference_steps=run.inference_steps,
            generator=torch.Generator().manual_seed(run.seed + first),
            **options,
        ).images
    return images


def measure(pipeline: DiffusionPipeline, family: str, pictures: Sequence[Picture], run: DenoiserRun) -> Scores:
    """Draw the captions of some pictures and score what comes out."""
    captions = [picture.caption for picture in pictures]
    return score_pictures(draw(pipeline, family, captions, run), captions)
