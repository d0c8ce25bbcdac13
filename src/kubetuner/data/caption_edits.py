"""Captions as they are encoded: filtered (``caption_filter_list``), then in shuffled variants (``caption_shuffle``)."""

import random
from collections.abc import Sequence

from kubetuner.config.data_file.caption_filters import parse_filter
from kubetuner.config.sections.captions import CaptionShuffle, DatasetCaptions

# Split at, joined with.
_MARKS = {"comma": (",", ", "), "space": (" ", " "), "period": (".", ". ")}


def edit_captions(settings: DatasetCaptions, captions: Sequence[str]) -> tuple[str, ...]:
    """The texts to encode for a picture's ``captions``: at least one, each once. An empty text is a text.

    Args:
        settings: What is done to the dataset's captions.
        captions: The picture's captions, at least one.
    """
    filters = [parse_filter(entry) for entry in settings.filters]
    texts: list[str] = []
    for caption in captions:
        for one in filters:
            caption = one.apply(caption)
        caption = caption.strip() if filters else caption
        texts += _variants(settings.shuffle, caption) if settings.shuffle else [caption]
    return tuple(dict.fromkeys(texts))


def _variants(shuffle: CaptionShuffle, caption: str) -> list[str]:
    """Shuffled forms of ``caption``, which stays as it is where fewer than two tags could change places."""
    mark, joint = _MARKS[shuffle.split_on]
    tags = [tag.strip() for tag in caption.split(mark) if tag.strip()]
    kept, loose = tags[: shuffle.position_start], tags[shuffle.position_start :]
    if len(loose) < 2:
        return [caption]
    end = "." if shuffle.split_on == "period" and caption.rstrip().endswith(".") else ""
    found = [caption] if shuffle.include_original else []
    for number in range(shuffle.count):
        order = random.Random(f"{shuffle.seed}/{number}/{caption}").sample(loose, len(loose))
        found.append(joint.join([*kept, *order]) + end)
    return found
