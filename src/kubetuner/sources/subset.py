"""``max_num_samples``: a part of a dataset that is always the same part."""

import random
from array import array
from itertools import compress

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
    places = array("I", pictures.order())
    random.Random(dataset).shuffle(places)
    kept = bytearray(len(pictures))
    for place in places[:most]:
        kept[place] = True
    return Items(compress(pictures, kept))
