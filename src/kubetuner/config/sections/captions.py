"""What ``cache_text_embeds`` does to captions before it encodes them."""

from typing import Literal

from kubetuner.config.sections.base import DEFAULT_SEED, Section


class CaptionShuffle(Section):
    """``caption_shuffle``: variants of a caption with its tags in another order.

    Attributes:
        count: Variants per caption, equal ones counted once.
        seed: Seeds the order, together with the caption.
        split_on: What parts a caption into tags.
        position_start: So many first tags keep their place.
        include_original: Whether the caption as it is stays among the variants.
    """

    count: int = 1
    seed: int = DEFAULT_SEED
    split_on: Literal["comma", "space", "period"] = "comma"
    position_start: int = 0
    include_original: bool = True


class DatasetCaptions(Section):
    """What is done to one dataset's captions.

    Attributes:
        id: The dataset.
        filters: ``caption_filter_list`` of its ``text_embeds`` entry, in order; see
            :mod:`kubetuner.config.data_file.caption_filters`.
        shuffle: ``None`` for none.
    """

    id: str
    filters: tuple[str, ...] = ()
    shuffle: CaptionShuffle | None = None
