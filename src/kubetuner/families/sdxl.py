"""Stable Diffusion XL: two CLIP text encoders, KL latents, epsilon prediction, size and crop conditioning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.objective import ProcessSettings
from kubetuner.config.sections.steps import CacheTextSection, EvaluateSection, ModelRef
from kubetuner.config.text_rounding import WHOLE_TEXT, TextRounding
from kubetuner.diffusion.epsilon import EpsilonProcess
from kubetuner.families import loading, noise
from kubetuner.families.adapters import Adapters
from kubetuner.families.autoencoders import KlLatents
from kubetuner.families.base import FamilyFacts, Named
from kubetuner.families.pictures import drawing, starting_noise
from kubetuner.families.quantised import load_text_encoder
from kubetuner.families.text import PAD_TO, TextEncoder, in_batches, stored_dtype

MAX_TOKENS = 77


@dataclass(frozen=True)
class SdxlTextEncoders:
    """CLIP-L and OpenCLIP-bigG.

    Attributes:
        first: CLIP-L.
        second: OpenCLIP-bigG, whose projected output is the pooled embedding.
        empty_is_zeros: The base's ``force_zeros_for_empty_prompt``: the empty text is all zeros.
    """

    first: TextEncoder
    second: TextEncoder
    empty_is_zeros: bool


class Sdxl(KlLatents, Adapters):
    """The SDXL family."""

    facts = FamilyFacts(
        name="sdxl",
        denoiser="unet",
        lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
        pipeline_loads_lora=True,
        text_tensors=("embeds", "pooled"),
        trims_text=False,
        license="openrail++",
        pipeline="StableDiffusionXLPipeline",
        repeated_blocks=("BasicTransformerBlock",),
        channels_last=True,
    )

    def load_text_encoders(
        self, ref: ModelRef, device: torch.device, rounding: TextRounding = WHOLE_TEXT
    ) -> SdxlTextEncoders:
        """Both CLIP text models and their tokenizers."""
        from diffusers import StableDiffusionXLPipeline
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        return SdxlTextEncoders(
            TextEncoder(
                loading.load_tokenizer(CLIPTokenizer, ref, "tokenizer"),
                load_text_encoder(CLIPTextModel, ref, "text_encoder", 1, rounding, device),
            ),
            TextEncoder(
                loading.load_tokenizer(CLIPTokenizer, ref, "tokenizer_2"),
                load_text_encoder(CLIPTextModelWithProjection, ref, "text_encoder_2", 2, rounding, device),
            ),
            loading.pipeline_setting(StableDiffusionXLPipeline, ref, "force_zeros_for_empty_prompt", True),
        )

    def encode_texts(self, encoders: SdxlTextEncoders, texts: Sequence[str], section: CacheTextSection) -> list[Named]:
        """``embeds`` ``[77, D1 + D2]`` (both penultimate layers) and ``pooled`` ``[D2]``.

        The empty text is zeros where the base draws its unconditional pictures with zeros, so that a dropped caption
        trains what guidance will use.
        """
        first, second = (_tokens(encoder, texts) for encoder in (encoders.first, encoders.second))
        rows = list(zip(texts, first, second, strict=True))
        dtype = stored_dtype(section)
        return in_batches(lambda some: _encode(encoders, some, dtype), rows, section.text_encoder_batch_size)

    def load_denoiser(self, ref: ModelRef, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """See :class:`~kubetuner.families.base.Family`."""
        from diffusers import UNet2DConditionModel

        return loading.load_model(UNet2DConditionModel, ref, "unet", device, dtype)

    def noise_process(self, ref: ModelRef, settings: ProcessSettings) -> EpsilonProcess:
        """Epsilon (or v) over the base's betas; ``settings.flow`` does not apply."""
        return noise.epsilon_process(ref, settings)

    def collate(
        self, texts: Sequence[Named | None], null: Named, rows: Sequence[LatentRow], pad_to: int = PAD_TO
    ) -> Named:
        """Text, pooled text and time ids; a dropped caption has zero time ids too.

        ``pad_to`` does not apply: every text has CLIP's 77 tokens.
        """
        chosen = [null if text is None else text for text in texts]
        ids = [[0.0] * 6 if text is None else _time_ids(row) for text, row in zip(texts, rows, strict=True)]
        return {
            "encoder_hidden_states": torch.stack([text["embeds"].float() for text in chosen]),
            "text_embeds": torch.stack([text["pooled"].float() for text in chosen]),
            "time_ids": torch.tensor(ids),
        }

    def conditioning_shapes(self, denoiser: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        """Always of 77 tokens; the pooled text is what the network's own size leaves beside six embedded time ids."""
        config = denoiser.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {
            "encoder_hidden_states": (MAX_TOKENS, config.cross_attention_dim),
            "text_embeds": (pooled,),
            "time_ids": (6,),
        }

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """See :class:`~kubetuner.families.base.Family`."""
        prediction: Tensor = denoiser(
            noisy,
            timesteps,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            added_cond_kwargs={"text_embeds": conditioning["text_embeds"], "time_ids": conditioning["time_ids"]},
            return_dict=False,
        )[0]
        return prediction

    def load_pipeline(self, ref: ModelRef, denoiser: nn.Module | None, device: torch.device) -> Any:
        """See :class:`~kubetuner.families.base.Family`."""
        from diffusers import StableDiffusionXLPipeline

        vae = self.load_vae(ref, device) if ref.vae_path else None
        pipeline = loading.load_parts(StableDiffusionXLPipeline, ref, {"unet": denoiser, "vae": vae}, device)
        noise.change_scheduler(pipeline, ref)
        return pipeline

    def draw(self, pipeline: Any, prompt: str, size: tuple[int, int], seed: int, section: EvaluateSection) -> Any:
        """See :class:`~kubetuner.families.base.Family`."""
        with drawing(pipeline, section):
            return pipeline(
                prompt=prompt,
                negative_prompt=section.negative_prompt or None,  # None lets the base put zeros for it.
                width=size[0],
                height=size[1],
                guidance_scale=section.guidance,
                num_inference_steps=section.num_inference_steps,
                generator=starting_noise(seed),
            ).images[0]


@torch.no_grad()
def _encode(
    encoders: SdxlTextEncoders, rows: Sequence[tuple[str, list[int], list[int]]], dtype: torch.dtype
) -> list[Named]:
    first, _ = _clip(encoders.first, [tokens for _, tokens, _ in rows])
    second, pooled = _clip(encoders.second, [tokens for _, _, tokens in rows])
    keep = torch.tensor([0.0 if encoders.empty_is_zeros and not text else 1.0 for text, _, _ in rows])
    embeds = (torch.cat([first, second], dim=-1) * keep[:, None, None]).to(dtype)
    pooled = (pooled * keep[:, None]).to(dtype)
    return [{"embeds": one, "pooled": other} for one, other in zip(embeds, pooled, strict=True)]


def _tokens(encoder: TextEncoder, texts: Sequence[str]) -> list[list[int]]:
    """The 77 tokens of each text."""
    tokens = encoder.tokenizer(list(texts), padding="max_length", max_length=MAX_TOKENS, truncation=True)
    ids: list[list[int]] = tokens.input_ids
    return ids


def _clip(encoder: TextEncoder, tokens: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Penultimate hidden states ``[B, 77, D]`` and the first output, which is pooled for the second encoder."""
    device = next(encoder.model.parameters()).device
    output = encoder.model(torch.tensor(tokens).to(device), output_hidden_states=True)
    return output.hidden_states[-2].float().cpu(), output[0].float().cpu()


def _time_ids(row: LatentRow) -> list[float]:
    (width, height), (top, left), (target_width, target_height) = row.intermediary_size, row.crop, row.target_size
    return [float(value) for value in (height, width, top, left, target_height, target_width)]
