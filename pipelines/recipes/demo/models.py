"""Builds small but genuine diffusers pipelines for the three families, and a small CLIP judge.

``unit`` size is for tests: random weights, built in a fraction of a second, the same for a seed.
``demo`` size is what ``make_bases`` trains. ``tiny`` and ``mid`` are for the benches beside other trainers: what a step
costs besides arithmetic shows in the one (0.2 to 1.7 million weights), arithmetic in the other (35 to 37 million).
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

from pipelines.recipes.demo.autoencoders import dc_autoencoder, kl_autoencoder
from pipelines.recipes.demo.shapes import PIXELS
from pipelines.recipes.demo.tokenizers import clip_tokenizer, gemma_tokenizer, t5_tokenizer

Size = Literal["unit", "demo", "tiny", "mid"]
FAMILIES = ("pixart_sigma", "sdxl", "sana")


@dataclass(frozen=True)
class _Shape:
    """Widths and depths of one family in one size."""

    vae_channels: tuple[int, ...]
    latent_channels: int
    text_width: int
    heads: int
    head_width: int
    layers: int
    unet_channels: tuple[int, ...] = ()


_SHAPES: dict[tuple[str, Size], _Shape] = {
    ("pixart_sigma", "unit"): _Shape((4, 4, 8, 8), 4, 16, 2, 16, 2),
    ("sdxl", "unit"): _Shape((4, 4, 8, 8), 4, 16, 2, 8, 1, (16, 32)),
    ("sana", "unit"): _Shape((4, 4, 8, 8), 4, 16, 2, 16, 2),
    ("pixart_sigma", "demo"): _Shape((8, 32, 32, 64), 8, 64, 4, 24, 4),
    ("sdxl", "demo"): _Shape((8, 32, 32, 64), 8, 64, 2, 32, 1, (32, 64)),
    ("sana", "demo"): _Shape((16, 32, 64, 64), 16, 64, 6, 16, 3),
    ("pixart_sigma", "tiny"): _Shape((16, 16, 32, 32), 4, 32, 4, 16, 2),
    ("sdxl", "tiny"): _Shape((16, 16, 32, 32), 4, 32, 2, 16, 1, (32, 64, 64)),
    ("sana", "tiny"): _Shape((16, 16, 16, 32, 32, 32), 32, 32, 4, 16, 2),
    ("pixart_sigma", "mid"): _Shape((32, 64, 64, 64), 4, 256, 6, 64, 14),
    ("sdxl", "mid"): _Shape((32, 64, 64, 64), 4, 256, 2, 32, 2, (64, 128, 320)),
    ("sana", "mid"): _Shape((16, 32, 64, 64, 64, 64), 32, 256, 12, 32, 15),
}


def build_pipeline(family: str, size: Size, seed: int = 0) -> DiffusionPipeline:
    """A pipeline with random weights; the same weights for the same seed."""
    shape = _SHAPES[(family, size)]
    with _seeded(seed):
        pipeline = _BUILDERS[family](shape)
        denoiser = pipeline.unet if family == "sdxl" else pipeline.transformer
        redraw_zero_weights(denoiser)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save as half-precision safetensors that load as float32 where no dtype is asked for."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    for part in parts:
        part.half()
    pipeline.save_pretrained(folder)
    for part in parts:
        part.float()
    _load_as_float32(folder.glob("*/config.json"))


def redraw_zero_weights(model: nn.Module) -> None:
    """Give weights that start at exactly zero a small random value, so gradients pass them."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch here and give back the caller's random state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _latent_edge(shape: _Shape) -> int:
    return PIXELS >> (len(shape.vae_channels) - 1)


def _pixart_sigma(shape: _Shape) -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=shape.text_width,
            d_kv=shape.text_width // 4,
            d_ff=shape.text_width * 2,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            dropout_rate=0.0,
        )
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_width,
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels * 2,
        num_layers=shape.layers,
        cross_attention_dim=shape.heads * shape.head_width,
        caption_channels=shape.text_width,
        sample_size=_latent_edge(shape),
        patch_size=2,
        interpolation_scale=1,
        use_additional_conditions=False,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=kl_autoencoder(shape.vae_channels, shape.latent_channels),
        transformer=transformer,
        scheduler=scheduler,
    )


def _clip_text_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _sdxl(shape: _Shape) -> DiffusionPipeline:
    first, second = clip_tokenizer(), clip_tokenizer(pad_token="!")
    width, depth = shape.text_width, len(shape.unet_channels)
    unet = UNet2DConditionModel(
        sample_size=_latent_edge(shape),
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels,
        block_out_channels=shape.unet_channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (depth - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (depth - 1) + ("UpBlock2D",),
        layers_per_block=shape.layers,
        transformer_layers_per_block=1,
        attention_head_dim=tuple(c // shape.head_width for c in shape.unet_channels),
        use_linear_projection=True,
        cross_attention_dim=2 * width,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=width + 6 * 16,
        norm_num_groups=8,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    return StableDiffusionXLPipeline(
        vae=kl_autoencoder(shape.vae_channels, shape.latent_channels),
        text_encoder=CLIPTextModel(_clip_text_config(first, width, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_clip_text_config(second, width, "gelu")),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _sana(shape: _Shape) -> DiffusionPipeline:
    tokenizer = gemma_tokenizer()
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=shape.text_width,
            intermediate_size=shape.text_width * 2,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=shape.text_width // 4,
            query_pre_attn_scalar=shape.text_width // 4,
            sliding_window=128,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    width = shape.heads * shape.head_width
    transformer = SanaTransformer2DModel(
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels,
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_width,
        num_layers=shape.layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=width // 2,
        cross_attention_dim=width,
        caption_channels=shape.text_width,
        mlp_ratio=2.5,
        sample_size=_latent_edge(shape),
        patch_size=1,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        algorithm_type="dpmsolver++",
        solver_order=2,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=dc_autoencoder(shape.vae_channels, shape.latent_channels),
        transformer=transformer,
        scheduler=scheduler,
    )


_BUILDERS: dict[str, Callable[[_Shape], DiffusionPipeline]] = {
    "pixart_sigma": _pixart_sigma,
    "sdxl": _sdxl,
    "sana": _sana,
}


def build_judge(seed: int = 0) -> tuple[CLIPModel, CLIPProcessor]:
    """An untrained CLIP of about a quarter of a million weights, and its processor."""
    tokenizer = clip_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=8,
        projection_dim=64,
    )
    with _seeded(seed):
        model = CLIPModel(
            CLIPConfig(
                text_config=_clip_text_config(tokenizer, 64, "quick_gelu").to_dict(),
                vision_config=vision.to_dict(),
                projection_dim=64,
                logit_scale_init_value=math.log(10.0),
            )
        )
    edge = {"height": PIXELS, "width": PIXELS}
    images = CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=edge)
    return model.eval(), CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def write_judge(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> None:
    """Save as half-precision safetensors that load as float32."""
    model.half()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.float()
    _load_as_float32([folder / "config.json"])


def _load_as_float32(configs: Iterable[Path]) -> None:
    """Text models load in the dtype of their config, not in float32 as diffusers' models do."""
    for path in configs:
        config = json.loads(path.read_text())
        if config.get("dtype") == "float16":
            path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
