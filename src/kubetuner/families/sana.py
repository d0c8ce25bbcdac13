"""Sana: Gemma text with an instruction, deep-compression latents, flow matching."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.objective import ProcessSettings
from kubetuner.config.sections.steps import CacheTextSection, EvaluateSection, ModelRef
from kubetuner.config.text_rounding import WHOLE_TEXT, TextRounding
from kubetuner.diffusion.flow import FlowProcess
from kubetuner.families import loading, noise
from kubetuner.families.adapters import Adapters
from kubetuner.families.autoencoders import as_wanted
from kubetuner.families.base import FamilyFacts, Named
from kubetuner.families.pictures import drawing, starting_noise
from kubetuner.families.quantised import load_text_encoder
from kubetuner.families.text import (
    PAD_TO,
    TextEncoder,
    Tokens,
    last_hidden_states,
    pad_together,
    padded_shapes,
    truncated_ids,
)

MAX_TOKENS = 300


class Sana(Adapters):
    """The Sana family."""

    facts = FamilyFacts(
        name="sana",
        denoiser="transformer",
        lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
        pipeline_loads_lora=True,
        text_tensors=("embeds",),
        trims_text=True,
        license="other",
        pipeline="SanaPipeline",
        repeated_blocks=("SanaTransformerBlock",),
        channels_last=False,
    )

    def load_vae(self, ref: ModelRef, device: torch.device) -> nn.Module:
        """See :class:`~kubetuner.families.base.Family`."""
        from diffusers import AutoencoderDC

        return loading.load_autoencoder(AutoencoderDC, ref, device)

    @torch.no_grad()
    def encode_pixels(self, vae: Any, pixels: Tensor, noise: Tensor | None) -> Tensor:
        """Deterministic, so ``noise`` is not used. SimpleTuner halves these latents before training; we do not."""
        latents: Tensor = vae.encode(as_wanted(vae, pixels)).latent * vae.config.scaling_factor
        return latents.float()

    def encode_moments(self, vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The latents, and zeros: this autoencoder gives no distribution."""
        latents = self.encode_pixels(vae, pixels, None)
        return latents, torch.zeros_like(latents)

    def latent_shape(self, vae: Any, height: int, width: int) -> tuple[int, int, int]:
        """See :class:`~kubetuner.families.base.Family`."""
        factor = 2 ** (len(vae.config.encoder_block_out_channels) - 1)
        return vae.config.latent_channels, height // factor, width // factor

    def load_text_encoders(
        self, ref: ModelRef, device: torch.device, rounding: TextRounding = WHOLE_TEXT
    ) -> TextEncoder:
        """Gemma 2 and its tokenizer."""
        from transformers import AutoTokenizer, Gemma2Model

        # It does not part words: a whole caption would be one that is remembered, in 4 to 10 kB, and hardly seen again.
        tokenizer = loading.load_tokenizer(AutoTokenizer, ref, "tokenizer", remembered=0)
        model: Any = load_text_encoder(Gemma2Model, ref, "text_encoder", 1, rounding, device)
        # Nothing is generated: keys and values of every layer would be kept in vain, 1 GB for 16 texts of 300 tokens.
        model.config.use_cache = False
        return TextEncoder(tokenizer, model)

    def tokenize(self, encoders: TextEncoder, texts: Sequence[str], section: CacheTextSection) -> list[Tokens]:
        """Instruction and text as Gemma reads them.

        Kept are the first position and those that the last ``max_length - 1`` of the padded sequence would hold, as
        Sana's own pipeline keeps them; the rest of the instruction only lends its context.
        """
        length = min(section.max_length or MAX_TOKENS, MAX_TOKENS)
        padded = length
        if section.instruction:
            padded += len(encoders.tokenizer.encode(section.instruction)) - 2
        prepared = [section.instruction + text.lower().strip() for text in texts]
        first_kept = padded - length + 1
        return [
            Tokens((ids,), kept=(slice(1), slice(first_kept, len(ids))))
            for ids in truncated_ids(encoders, prepared, padded)
        ]

    def encode_tokens(self, encoders: TextEncoder, tokens: Sequence[Tokens]) -> Named:
        """Gemma's last hidden states: ``embeds`` ``[B, L, D]``."""
        return {"embeds": last_hidden_states(encoders, tokens)}

    def load_denoiser(self, ref: ModelRef, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """See :class:`~kubetuner.families.base.Family`."""
        from diffusers import SanaTransformer2DModel

        return loading.load_model(SanaTransformer2DModel, ref, "transformer", device, dtype)

    def noise_process(self, ref: ModelRef, settings: ProcessSettings) -> FlowProcess:
        """Flow matching with the density and shift of ``settings.flow``; segments and bias do not apply."""
        if not settings.flow.auto_shift:
            return FlowProcess(settings.flow, scoring=settings.loss, offset=settings.offset)
        from diffusers import SanaTransformer2DModel

        patch = loading.load_config(SanaTransformer2DModel, ref, self.facts.denoiser)["patch_size"]
        return FlowProcess(settings.flow, noise.auto_shift(ref, patch), settings.loss, settings.offset)

    def collate(
        self, texts: Sequence[Named | None], null: Named, rows: Sequence[LatentRow], pad_to: int = PAD_TO
    ) -> Named:
        """Padded text and its mask."""
        states, mask = pad_together([(null if text is None else text)["embeds"] for text in texts], pad_to)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def conditioning_shapes(self, denoiser: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        """See :class:`~kubetuner.families.base.Family`."""
        return padded_shapes(tokens, denoiser.config.caption_channels)

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """See :class:`~kubetuner.families.base.Family`."""
        prediction: Tensor = denoiser(
            noisy,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            encoder_attention_mask=conditioning["encoder_attention_mask"],
            timestep=timesteps * denoiser.config.timestep_scale,
            return_dict=False,
        )[0]
        return prediction

    def load_pipeline(self, ref: ModelRef, denoiser: nn.Module | None, device: torch.device) -> Any:
        """See :class:`~kubetuner.families.base.Family`."""
        from diffusers import SanaPipeline

        vae = self.load_vae(ref, device) if ref.vae_path else None
        return loading.load_parts(SanaPipeline, ref, {"transformer": denoiser, "vae": vae}, device)

    def draw(self, pipeline: Any, prompt: str, size: tuple[int, int], seed: int, section: EvaluateSection) -> Any:
        """See :class:`~kubetuner.families.base.Family`."""
        with drawing(pipeline, section):
            return pipeline(
                prompt=prompt,
                negative_prompt=section.negative_prompt,
                width=size[0],
                height=size[1],
                guidance_scale=section.guidance,
                num_inference_steps=section.num_inference_steps,
                generator=starting_noise(seed),
                max_sequence_length=min(section.max_length or MAX_TOKENS, MAX_TOKENS),
                clean_caption=False,
                use_resolution_binning=False,
                complex_human_instruction=[section.instruction] if section.instruction else None,
            ).images[0]
