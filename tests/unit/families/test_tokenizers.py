"""What tokenizers remember."""

import ctypes

import pytest
import torch

from kubetuner.config.sections.steps import ModelRef
from kubetuner.families import load_family, loading

# mallinfo2's fields, from malloc.h.
_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
CAPTIONS = 4096


class _Usage(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


def _allocated() -> int:
    """Bytes in use that this thread got from the C library, as Rust gets its memory."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Usage
    usage = mallinfo()
    return int(usage.uordblks + usage.hblkhd)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="tells the memory of glibc 2.33 and later")
def test_captions_are_not_remembered(refs: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the tokenizers package no longer lets it be bounded: 3 kB of each caption stay then."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # Other threads would allocate elsewhere.
    tokenizer = load_family("sana").load_text_encoders(refs["sana"], torch.device("cpu")).tokenizer
    tokenizer(["a picture"])
    before = _allocated()

    for start in range(0, CAPTIONS, 512):
        tokenizer([f"picture {i} of a red circle on a white background" for i in range(start, start + 512)])

    assert (_allocated() - before) / CAPTIONS < 100


@pytest.mark.parametrize(("name", "folder"), [("pixart_sigma", "tokenizer"), ("sdxl", "tokenizer_2")])
def test_other_tokenizers_can_forget_too(name: str, folder: str, refs: dict[str, ModelRef]) -> None:
    """Their words are short, so that a bound hardly shows in the memory."""
    from transformers import CLIPTokenizer, T5Tokenizer

    kind = CLIPTokenizer if name == "sdxl" else T5Tokenizer

    assert callable(loading.load_tokenizer(kind, refs[name], folder).backend_tokenizer.model._resize_cache)
