"""Texts to what caches keep of them, with the bits that every step gives them.

Kernels are chosen by the shape of a batch, so the last bits of an embedding depend on that shape, though not on the
other texts. Here the shape follows from the text alone: its length is rounded up and batches are filled up.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from kubetuner.config.sections.steps import CacheTextSection
from kubetuner.families.base import Family, Named
from kubetuner.families.text import Tokens
from kubetuner.families.transfers import Arriving, one_behind
from kubetuner.threads import in_threads

KeyT = TypeVar("KeyT")
ItemT = TypeVar("ItemT")

# Read and tokenized by a thread while those before are encoded.
_TOKENIZED_AT_ONCE = 512


def encode_texts(family: Family, encoders: Any, texts: Sequence[str], section: CacheTextSection) -> list[Named]:
    """Per text its tensors on the CPU, without a batch dimension, in the section's dtype; see :func:`encode_all`."""
    named = dict(encode_all(family, encoders, section, range(len(texts)), texts.__getitem__))
    return [named[place] for place in range(len(texts))]


def encode_all(
    family: Family,
    encoders: Any,
    section: CacheTextSection,
    keys: Iterable[KeyT],
    text_of: Callable[[KeyT], str],
) -> Iterator[tuple[KeyT, Named]]:
    """The tensors of many texts, as batches of one length become full, which is not their order.

    A thread reads and tokenizes ahead, and a GPU gets the next batch before it has finished with the last. Texts that
    are about sorted by length wait for few others.

    Args:
        family: Tokenizes and encodes.
        encoders: Its encoders.
        section: Settings, the size of batches and the dtype among them.
        keys: What to call the texts.
        text_of: The text of a key; asked by one other thread.
    """
    size = section.text_encoder_batch_size
    dtype = torch.bfloat16 if section.dtype == "bf16" else torch.float32

    def tokenize(some: Sequence[KeyT]) -> list[tuple[KeyT, Tokens]]:
        return list(zip(some, family.tokenize(encoders, [text_of(key) for key in some], section), strict=True))

    def begin(batch: Sequence[tuple[KeyT, Tokens]]) -> tuple[Sequence[tuple[KeyT, Tokens]], Arriving]:
        tokens = [one for _, one in batch]
        made = family.encode_tokens(encoders, [*tokens, *[tokens[-1]] * (size - len(tokens))])
        return batch, Arriving(made, dtype)

    tokenized = in_threads(tokenize, _parts(keys, _TOKENIZED_AT_ONCE), 1, "kubetuner-texts", ahead=1)
    for batch, arriving in one_behind(map(begin, _batches(chain.from_iterable(tokenized), size))):
        yield from _arrived(batch, arriving)


def _batches(texts: Iterable[tuple[KeyT, Tokens]], size: int) -> Iterator[list[tuple[KeyT, Tokens]]]:
    """``size`` texts of one padded length; at the end what is left of each length, the longest first."""
    waiting: dict[int, list[tuple[KeyT, Tokens]]] = defaultdict(list)
    for text in texts:
        alike = waiting[text[1].padded_length]
        alike.append(text)
        if len(alike) == size:
            yield waiting.pop(text[1].padded_length)
    for _, left in sorted(waiting.items(), reverse=True):
        yield left


def _arrived(batch: Sequence[tuple[KeyT, Tokens]], arriving: Arriving) -> Iterator[tuple[KeyT, Named]]:
    cut = {name: _cut([tokens for _, tokens in batch], tensor) for name, tensor in arriving.tensors().items()}
    for row, (key, _) in enumerate(batch):
        yield key, {name: tensors[row] for name, tensors in cut.items()}


def _cut(texts: Sequence[Tokens], tensor: Tensor) -> list[Tensor]:
    """What is kept of each text of a batch, copied into one block.

    Left singly between the batches' large blocks, they would keep these from being joined again, and every batch would
    take new memory.
    """
    pieces = [tokens.pieces(row) for tokens, row in zip(texts, tensor, strict=False)]
    block = torch.cat([piece for each in pieces for piece in each])
    cut = torch.split(block, [sum(len(piece) for piece in each) for each in pieces])
    return [one if tokens.factor == 1.0 else one * tokens.factor for tokens, one in zip(texts, cut, strict=True)]


def _parts(items: Iterable[ItemT], size: int) -> Iterator[list[ItemT]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
