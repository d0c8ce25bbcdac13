"""``max_num_samples``: a part of a dataset that is always the same part."""

import random
from collections.abc import Sequence
from typing import TypeVar

ItemT = TypeVar("ItemT")


def subset(items: Sequence[ItemT], dataset: str, most: int | None) -> tuple[ItemT, ...]:
    """At most ``most`` of ``items``, in their order.

    As SimpleTuner does, the listing is shuffled by a generator seeded with the dataset's id, and cut.

    Args:
        items: The dataset's pictures, sorted by name.
        dataset: ``id`` of the entry.
        most: ``max_num_samples``; ``None`` for all.
    """
    if most is None or len(items) <= most:
        return tuple(items)
    positions = list(range(len(items)))
    random.Random(dataset).shuffle(positions)
    return tuple(items[position] for position in sorted(positions[:most]))
