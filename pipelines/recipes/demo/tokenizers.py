"""Tokenizers of the three real kinds, made from a word list: no download, no training.

Every word of the demo's captions is one token, so that a frozen random text encoder gives each
word its own direction. Any other text falls back to single characters or bytes.
"""

import string
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, GemmaTokenizer, T5Tokenizer

from pipelines.recipes.demo.shapes import ALL_SHAPES, BACKGROUNDS, COLOURS

WORDS = (
    *("a", "an", "the", "on", "of", "in", "and", "with", "background"),
    *COLOURS,
    *BACKGROUNDS,
    *ALL_SHAPES,
    *("photo", "picture", "painting", "drawing", "blurry", "low", "quality", "text"),
)
SPACE = "\u2581"
"""What sentencepiece writes for a space."""
_WORD_END = "</w>"


def t5_tokenizer() -> T5Tokenizer:
    """A unigram vocabulary: whole words score best, then single characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -4.0)]
    pieces += [(SPACE + word, -3.0) for word in WORDS]
    pieces += [(character, -6.0) for character in string.printable.strip()]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def gemma_tokenizer() -> GemmaTokenizer:
    """Byte-pair merges over characters with a byte fallback; a start token as in Gemma.

    The first word of a text has no space before it, so every word is a token with and without.
    """
    characters = [SPACE, *string.printable.strip()]
    merges = _merges([[SPACE, *word] for word in WORDS] + [list(word) for word in WORDS])
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [*characters, *(left + right for left, right in merges)]
    tokenizer = GemmaTokenizer(vocab=_numbered(tokens), merges=merges, model_max_length=512, add_bos_token=True)
    tokenizer.padding_side = "right"
    return tokenizer


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Byte-pair merges over bytes with an end-of-word mark."""
    letters = sorted(ByteLevel.alphabet())
    merges = _merges([[*word[:-1], word[-1] + _WORD_END] for word in WORDS])
    tokens = [*letters, *(letter + _WORD_END for letter in letters)]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab=_numbered(tokens), merges=merges, pad_token=pad_token, model_max_length=77)


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def _merges(words: list[list[str]]) -> list[tuple[str, str]]:
    """Merges that turn each spelled word into one token.

    A word is first merged as far as the earlier rules go, then gets the rules it still lacks.
    Later rules rank lower, so they can't undo an earlier word.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        parts = _merged(word, ranks)
        while len(parts) > 1:
            ranks[(parts[0], parts[1])] = len(ranks)
            parts = _merged(parts, ranks)
    return list(ranks)


def _merged(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The parts after every rule that applies, best rank first."""
    parts = list(parts)
    while True:
        pairs = list(pairwise(parts))
        known = [pair for pair in pairs if pair in ranks]
        if not known:
            return parts
        at = pairs.index(min(known, key=ranks.__getitem__))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
