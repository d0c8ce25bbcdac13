"""PixArt Sigma: T5 text, KL latents, epsilon prediction with a learned variance that is not trained."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote_plus

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
from kubetuner.families.text import PAD_TO, TextEncoder, encode_at_length, pad_together, padded_shapes

MAX_TOKENS = 300


class PixArtSigma(KlLatents, Adapters):
    """The PixArt Sigma family."""

    facts = FamilyFacts(
        name="pixart_sigma",
        denoiser="transformer",
        lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
        pipeline_loads_lora=False,
        text_tensors=("embeds",),
        trims_text=True,
        license="openrail++",
        pipeline="PixArtSigmaPipeline",
        repeated_blocks=("BasicTransformerBlock",),
        channels_last=False,
    )

    def load_text_encoders(
        self, ref: ModelRef, device: torch.device, rounding: TextRounding = WHOLE_TEXT
    ) -> TextEncoder:
        """T5 and its tokenizer."""
        from transformers import AutoTokenizer, T5EncoderModel

        tokenizer = loading.load_tokenizer(AutoTokenizer, ref, "tokenizer")
        return TextEncoder(tokenizer, load_text_encoder(T5EncoderModel, ref, "text_encoder", 1, rounding, device))

    def encode_texts(self, encoders: TextEncoder, texts: Sequence[str], section: CacheTextSection) -> list[Named]:
        """T5's last hidden states of the cleaned texts, trimmed to their tokens: ``embeds`` ``[tokens, D]``."""
        prepared = prepare(texts, section.clean_caption)
        length = min(section.max_length or MAX_TOKENS, MAX_TOKENS)
        states = encode_at_length(encoders, prepared, length, section)
        return [{"embeds": state} for state in states]

    def load_denoiser(self, ref: ModelRef, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """See :class:`~kubetuner.families.base.Family`."""
        from diffusers import PixArtTransformer2DModel

        return loading.load_model(PixArtTransformer2DModel, ref, "transformer", device, dtype)

    def noise_process(self, ref: ModelRef, settings: ProcessSettings) -> EpsilonProcess:
        """Epsilon (or v) over the base's betas; ``settings.flow`` does not apply."""
        return noise.epsilon_process(ref, settings)

    def collate(
        self, texts: Sequence[Named | None], null: Named, rows: Sequence[LatentRow], pad_to: int = PAD_TO
    ) -> Named:
        """Padded text and its mask; the picture sizes (height, width), which only some PixArt models read."""
        states, mask = pad_together([(null if text is None else text)["embeds"] for text in texts], pad_to)
        sizes = torch.tensor([[row.target_size[1], row.target_size[0]] for row in rows], dtype=torch.float32)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask, "resolution": sizes}

    def conditioning_shapes(self, denoiser: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        """See :class:`~kubetuner.families.base.Family`."""
        return {**padded_shapes(tokens, denoiser.config.caption_channels), "resolution": (2,)}

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """The first half of the output channels; the second half is the learned variance."""
        size = conditioning.get("resolution") if getattr(denoiser, "use_additional_conditions", False) else None
        added = {
            "resolution": size,
            "aspect_ratio": None if size is None else size[:, :1] / size[:, 1:],
        }
        output = denoiser(
            noisy,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            encoder_attention_mask=conditioning["encoder_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        prediction: Tensor = output[:, : noisy.shape[1]]
        return prediction

    def load_pipeline(self, ref: ModelRef, denoiser: nn.Module | None, device: torch.device) -> Any:
        """See :class:`~kubetuner.families.base.Family`."""
        from diffusers import PixArtSigmaPipeline

        vae = self.load_vae(ref, device) if ref.vae_path else None
        pipeline = loading.load_parts(PixArtSigmaPipeline, ref, {"transformer": denoiser, "vae": vae}, device)
        noise.change_scheduler(pipeline, ref)
        return pipeline

    def draw(self, pipeline: Any, prompt: str, size: tuple[int, int], seed: int, section: EvaluateSection) -> Any:
        """See :class:`~kubetuner.families.base.Family`."""
        with drawing(pipeline, section), _cleaning():
            return pipeline(
                prompt=prompt,
                negative_prompt=section.negative_prompt,
                width=size[0],
                height=size[1],
                guidance_scale=section.guidance,
                num_inference_steps=section.num_inference_steps,
                generator=starting_noise(seed),
                max_sequence_length=min(section.max_length or MAX_TOKENS, MAX_TOKENS),
                clean_caption=section.clean_caption,
                use_resolution_binning=False,
            ).images[0]


def prepare(texts: Sequence[str], clean: bool) -> list[str]:
    """Texts as T5 sees them: cleaned twice in DeepFloyd's manner (diffusers' own code), or lower-cased and stripped."""
    if not clean:
        return [text.lower().strip() for text in texts]
    from diffusers import PixArtSigmaPipeline

    cleaner = object.__new__(PixArtSigmaPipeline)  # The cleaning methods use no state.
    with _cleaning():
        return [_clean_twice(cleaner._clean_caption, text) for text in texts]


def _clean_twice(clean: Callable[[str], str], text: str) -> str:
    """``clean(clean(text))``; most captions need it once, which at 200 µs a time is worth finding out.

    Cleaning begins with :func:`_begin` and sees nothing but its result. Where it leaves that as it is, and so would the
    beginning, it would do the same again.
    """
    once = clean(text)
    return once if once == _begin(text) == _begin(once) else clean(once)


def _begin(text: str) -> str:
    return unquote_plus(text).strip().lower()


@contextmanager
def _cleaning() -> Iterator[None]:
    """BeautifulSoup wonders whether a caption that looks like a file name or an address should have been opened."""
    from bs4 import MarkupResemblesLocatorWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        yield
