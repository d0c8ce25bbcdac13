"""Builds small autoencoders of the two real kinds: KL for SDXL and PixArt Sigma, DC for Sana."""

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import nn

from pipelines.recipes.demo.shapes import PIXELS

_UNTRAINED_KL_SCALE = 3.5
_UNTRAINED_DC_SCALE = 0.65
"""Roughly one over the latents' deviation. Not 1, so that forgetting to scale shows in a test."""
_LOG_VARIANCE = -10.0


def kl_autoencoder(channels: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
    """Every stage after the first halves the picture. One norm group, or flat colours get lost."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        sample_size=PIXELS,
        scaling_factor=_UNTRAINED_KL_SCALE,
        mid_block_add_attention=False,
    )
    _start_near_linear(vae)
    _set_certain(vae.quant_conv)
    return vae


def dc_autoencoder(channels: tuple[int, ...], latent_channels: int) -> AutoencoderDC:
    """Like the real one in kind; no block at full resolution, which makes it twice as fast."""
    layers = (0,) + (1,) * (len(channels) - 1)
    no_scales: tuple[tuple[int, ...], ...] = ((),) * len(channels)
    return AutoencoderDC(
        latent_channels=latent_channels,
        attention_head_dim=min(16, channels[0]),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=no_scales,
        decoder_qkv_multiscales=no_scales,
        downsample_block_type="stride_conv",
        upsample_block_type="interpolate",
        scaling_factor=_UNTRAINED_DC_SCALE,
    )


def _start_near_linear(vae: AutoencoderKL) -> None:
    """Start as a picture pyramid instead of noise; a few minutes of training then suffice.

    Residual branches are off, plain convolutions copy their channels, and each halving takes
    block means and differences.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if name.endswith(".conv2"):
            nn.init.zeros_(module.weight)
        elif "downsamplers" in name:
            _set_block_means(module)
        elif name.endswith((".conv_shortcut", "encoder.conv_in")) or "upsamplers" in name:
            _set_copy(module)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def _set_copy(conv: nn.Conv2d) -> None:
    middle = conv.kernel_size[0] // 2
    conv.weight.mul_(0.1)
    for out in range(conv.out_channels):
        conv.weight[out, out % conv.in_channels, middle, middle] += 1.0


@torch.no_grad()
def _set_block_means(conv: nn.Conv2d) -> None:
    """The mean of each 2 x 2 block, then its three Haar differences where there's room."""
    patterns = torch.tensor([[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]])
    conv.weight.mul_(0.1)
    for out in range(conv.out_channels):
        pattern = patterns[min(out // conv.in_channels, 3)]
        conv.weight[out, out % conv.in_channels, :2, :2] += 0.25 * pattern


@torch.no_grad()
def _set_certain(conv: nn.Conv2d) -> None:
    """A tiny fixed variance: a sampled latent is then practically the mean."""
    variances = conv.out_channels // 2
    assert conv.bias is not None
    conv.weight[variances:] = 0.0
    conv.bias[variances:] = _LOG_VARIANCE
