"""Sequences of different lengths: encode those of a length together, keep what counts, pad them again in batches.

Kernels are chosen by the shape of a batch, so the last bits of an embedding depend on that shape, though not on the
other texts. Here the shape follows from the text alone: its length is rounded up and batches are filled up.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kubetuner.config.sections.steps import CacheTextSection

ItemT = TypeVar("ItemT")

PAD_TO = 8
PAD_TO_COMPILED = 64
"""Of a compiled denoiser: 300 tokens have 5 lengths then instead of 38, and each is compiled for itself."""


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and its frozen model."""

    tokenizer: Any
    model: nn.Module


def stored_dtype(section: CacheTextSection) -> torch.dtype:
    """What embeddings are stored in, and so are made: those of a whole shard are in memory together."""
    return torch.bfloat16 if section.dtype == "bf16" else torch.float32


@torch.no_grad()
def encode_at_length(
    encoder: TextEncoder, texts: Sequence[str], max_length: int, section: CacheTextSection
) -> list[Tensor]:
    """Last hidden states ``[tokens, D]`` per text on CPU, in the section's dtype, without padding.

    Texts of about one length are encoded together, so little is padded; whatever the others, a result is the same.
    The results lie in one block: left singly between the batches' large blocks, they would keep these from being joined
    again, and every batch would take new memory.
    """
    dtype, batch_size = stored_dtype(section), section.text_encoder_batch_size
    tokenizer, model = encoder.tokenizer, encoder.model
    device = next(model.parameters()).device
    ids: list[list[int]] = tokenizer(
        list(texts), truncation=True, max_length=max_length, add_special_tokens=True
    ).input_ids
    lengths = [len(row) for row in ids]
    states: Sequence[Tensor] = ()
    for length, places in _by_length(lengths, batch_size):
        rows = [ids[place] + [tokenizer.pad_token_id] * (length - len(ids[place])) for place in places]
        filled = torch.tensor(_filled([lengths[place] for place in places], batch_size))
        mask = (torch.arange(length) < filled[:, None]).long()
        hidden = model(torch.tensor(_filled(rows, batch_size)).to(device), attention_mask=mask.to(device))[0]
        hidden = hidden.to("cpu", dtype)
        states = states or hidden.new_empty(sum(lengths), hidden.shape[-1]).split(lengths)
        for place, state in zip(places, hidden, strict=False):
            states[place].copy_(state[: lengths[place]])
    return list(states)


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


def in_batches(
    encode: Callable[[Sequence[ItemT]], list[dict[str, Tensor]]], texts: Sequence[ItemT], batch_size: int
) -> list[dict[str, Tensor]]:
    """``encode`` applied to exactly ``batch_size`` texts, in whatever form, at a time."""
    batches = (texts[at : at + batch_size] for at in range(0, len(texts), batch_size))
    return [named for batch in batches for named in encode(_filled(batch, batch_size))[: len(batch)]]


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Length to pad to and at most ``batch_size`` places of that length."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, length in enumerate(lengths):
        groups[-(-length // PAD_TO) * PAD_TO].append(place)
    for length, places in sorted(groups.items()):
        for at in range(0, len(places), batch_size):
            yield length, places[at : at + batch_size]


def _filled(batch: Sequence[ItemT], size: int) -> list[ItemT]:
    return [*batch, *[batch[-1]] * (size - len(batch))]
