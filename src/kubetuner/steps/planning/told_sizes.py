"""Sizes of pictures that a table tells: a few are measured, and all are where one of these is another.

A table may have outlived its pictures, or tell the sizes of files that EXIF data turns. Every picture's true size is
known once it is downloaded, but by then the plan has been made with the table's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from kubetuner.errors import on_one_line
from kubetuner.sources.base import Item

Size = tuple[int, int]

CHECKED = 32


def doubt(pictures: Sequence[Item], measure: Callable[[Item], Size | str]) -> str:
    """Which picture has another size than it is said to have, of :data:`CHECKED` spread over all; empty if none has.

    Args:
        pictures: Those whose ``pixels`` are set are looked at.
        measure: The size of a picture whose ``pixels`` are not set, or why it has none.
    """
    for place in range(0, len(pictures), -(-len(pictures) // CHECKED)):
        item = pictures[place]
        size = measure(replace(item, pixels=None)) if item.pixels else ""
        if isinstance(size, tuple) and item.pixels and size != item.pixels:
            told, found = (f"{width}x{height}" for width, height in (item.pixels, size))
            return f"says {told} of {on_one_line(item.name)}, which is {found}"
    return ""


def size_remarks(doubted: Mapping[str, str]) -> list[str]:
    """A sentence for each dataset whose table is not believed, by its id."""
    return [f"`{name}`: the table {reason}; every picture was measured instead" for name, reason in doubted.items()]
