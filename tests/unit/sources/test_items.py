import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubetuner.sources.items import Item, Items, ItemsByName

NAMES = st.text(st.characters(exclude_categories=(), exclude_characters="\0"), max_size=4)
ITEMS = st.builds(
    Item,
    NAMES,
    st.integers(-1, 2**62),
    st.text(max_size=3),
    st.integers(0, 2**62),
    st.just("crc32c:AAAA="),
    st.none() | st.lists(st.text(max_size=3)).map(tuple),
    st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
ITEMS |= ITEMS.map(lambda item: replace(item, version=str(item.modified)))  # As those of a folder.


@given(st.lists(ITEMS, unique_by=lambda item: item.name))
def test_items_come_out_as_they_went_in(given_items: list[Item]) -> None:
    items = Items(given_items)
    assert list(items) == given_items
    assert [items[place] for place in range(len(items))] == given_items
    assert list(items[1:3]) == given_items[1:3]
    by_name = sorted(given_items, key=lambda item: item.name)
    assert [items[place] for place in items.order()] == by_name
    items.sort()
    assert list(items) == by_name
    assert items.order() == range(len(items))


@given(st.lists(ITEMS, unique_by=lambda item: item.name), NAMES)
def test_items_are_found_by_name(given_items: list[Item], name: str) -> None:
    by_name = ItemsByName(Items(given_items))
    assert dict(by_name) == {item.name: item for item in given_items}
    assert list(by_name) == sorted(by_name)
    assert by_name.get(name) == next((item for item in given_items if item.name == name), None)


def test_items_take_little_python_memory() -> None:
    name = "folder/a picture with a name of usual length"
    tracemalloc.start()
    items = Items(Item(f"{name}, number {number}.png", 1 << 20, str(1 << 60), 1 << 60) for number in range(5000))
    items.sort()
    by_name = ItemsByName(items)
    assert by_name[f"{name}, number 77.png"].size == 1 << 20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * len(items)
    with pytest.raises(IndexError):
        items[5000]
