"""What families share of their texts: tokens, sequences of different lengths, and their padding in batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kubetuner.families.transfers import sent

PAD_TO = 8
PAD_TO_COMPILED = 64
"""Of a compiled denoiser: 300 tokens have 5 lengths then instead of 38, and each is compiled for itself."""


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and its frozen model."""

    tokenizer: Any
    model: nn.Module


@dataclass(frozen=True)
class Tokens:
    """A text as the encoders of a family read it.

    Attributes:
        ids: Of each encoder; all texts of a batch have as many after padding.
        kept: The positions of its tensors that are kept, in order; empty for all.
        factor: What its tensors are multiplied by: 0 makes an empty text zeros.
    """

    ids: tuple[list[int], ...]
    kept: tuple[slice, ...] = ()
    factor: float = 1.0

    @property
    def padded_length(self) -> int:
        """Tokens after padding."""
        return -(-len(self.ids[0]) // PAD_TO) * PAD_TO

    def pieces(self, tensor: Tensor) -> list[Tensor]:
        """What is kept of one of its tensors."""
        return [tensor[kept] for kept in self.kept or (slice(None),)]


@torch.no_grad()
def last_hidden_states(encoder: TextEncoder, tokens: Sequence[Tokens]) -> Tensor:
    """``[B, L, D]`` of texts of one padded length L, on the encoder's device."""
    length = tokens[0].padded_length
    pad = encoder.tokenizer.pad_token_id
    rows = [one.ids[0] + [pad] * (length - len(one.ids[0])) for one in tokens]
    mask = (torch.arange(length) < torch.tensor([len(one.ids[0]) for one in tokens])[:, None]).long()
    device = next(encoder.model.parameters()).device
    states: Tensor = encoder.model(sent(torch.tensor(rows), device), attention_mask=sent(mask, device))[0]
    return states


def truncated_ids(encoder: TextEncoder, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """The tokens of each text with the tokenizer's marks, at most ``max_length``."""
    found = encoder.tokenizer(list(texts), truncation=True, max_length=max_length, add_special_tokens=True)
    ids: list[list[int]] = found.input_ids
    return ids


def pad_together(sequences: Sequence[Tensor], pad_to: int = PAD_TO) -> tuple[Tensor, Tensor]:
    """Float32 ``[B, L, D]`` of padded ``[tokens, D]`` sequences and the mask ``[B, L]``; ``pad_to`` divides L."""
    longest = max(len(sequence) for sequence in sequences)
    length = -(-longest // pad_to) * pad_to
    states = torch.zeros(len(sequences), length, sequences[0].shape[-1])
    mask = torch.zeros(len(sequences), length)
    for row, sequence in enumerate(sequences):
        states[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return states, mask


def padded_shapes(tokens: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes, without the batch, of :func:`pad_together`'s two tensors under the names that denoisers give them."""
    length = -(-tokens // PAD_TO) * PAD_TO
    return {"encoder_hidden_states": (length, width), "encoder_attention_mask": (length,)}
