"""Sequences of different lengths: encode them in order of length, keep what counts, pad them again in batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PAD_TO = 8


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and its frozen model."""

    tokenizer: Any
    model: nn.Module


@torch.no_grad()
def encode_at_length(encoder: TextEncoder, texts: Sequence[str], max_length: int, batch_size: int) -> list[Tensor]:
    """Last hidden states ``[tokens, D]`` per text on CPU, float32, without padding.

    Neighbours in length are encoded together, so little is padded. Masked padding changes nothing but the last bits.
    """
    tokenizer, model = encoder.tokenizer, encoder.model
    device = next(model.parameters()).device
    ids: list[list[int]] = [
        tokenizer(text, truncation=True, max_length=max_length, add_special_tokens=True).input_ids for text in texts
    ]
    states: dict[int, Tensor] = {}
    for places in _by_length([len(row) for row in ids], batch_size):
        longest = len(ids[places[-1]])
        input_ids = torch.full((len(places), longest), int(tokenizer.pad_token_id))
        mask = torch.zeros_like(input_ids)
        for row, place in enumerate(places):
            input_ids[row, : len(ids[place])] = torch.tensor(ids[place])
            mask[row, : len(ids[place])] = 1
        hidden = model(input_ids.to(device), attention_mask=mask.to(device))[0]
        for row, place in enumerate(places):
            states[place] = hidden[row, : len(ids[place])].float().cpu().clone()
    return [states[place] for place in range(len(ids))]


def pad_together(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Float32 ``[B, L, D]`` of padded ``[tokens, D]`` sequences and the mask ``[B, L]``; L is a multiple of 8."""
    longest = max(len(sequence) for sequence in sequences)
    length = -(-longest // PAD_TO) * PAD_TO
    states = torch.zeros(len(sequences), length, sequences[0].shape[-1])
    mask = torch.zeros(len(sequences), length)
    for row, sequence in enumerate(sequences):
        states[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return states, mask


def in_batches(
    encode: Callable[[Sequence[str]], list[dict[str, Tensor]]], texts: Sequence[str], batch_size: int
) -> list[dict[str, Tensor]]:
    """``encode`` applied to ``batch_size`` texts at a time."""
    return [named for at in range(0, len(texts), batch_size) for named in encode(texts[at : at + batch_size])]


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for at in range(0, len(order), batch_size):
        yield order[at : at + batch_size]
