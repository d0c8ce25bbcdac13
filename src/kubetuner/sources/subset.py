"""``max_num_samples``: a part of a dataset that is always the same part."""

import random
from collections.abc import Sequence

from kubetuner.sources.base import Item


def subset(pictures: Sequence[Item], dataset: str, most: int | None) -> tuple[Item, ...]:
    """At most ``most`` of ``pictures``, in their order; the same ones wherever they lie.

    As SimpleTuner does, the sorted listing is shuffled by a generator seeded with the dataset's id, and cut.

    Args:
        pictures: The dataset's pictures.
        dataset: ``id`` of the entry.
        most: ``max_num_samples``; ``None`` for all.
    """
    if most is None or len(pictures) <= most:
        return tuple(pictures)
    names = sorted(picture.name for picture in pictures)
    random.Random(dataset).shuffle(names)
    kept = set(names[:most])
    return tuple(picture for picture in pictures if picture.name in kept)
