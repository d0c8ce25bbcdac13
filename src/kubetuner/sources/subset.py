"""``max_num_samples``: a part of a dataset that is always the same part."""

import random

from kubetuner.sources.items import Items


def subset(pictures: Items, dataset: str, most: int | None) -> Items:
    """At most ``most`` of ``pictures``, in their order; the same ones wherever they lie.

    As SimpleTuner does, the sorted listing is shuffled by a generator seeded with the dataset's id, and cut.

    Args:
        pictures: The dataset's pictures.
        dataset: ``id`` of the entry.
        most: ``max_num_samples``; ``None`` for all.
    """
    if most is None or len(pictures) <= most:
        return pictures
    names = sorted(picture.name for picture in pictures)
    random.Random(dataset).shuffle(names)
    kept = set(names[:most])
    return Items(picture for picture in pictures if picture.name in kept)
