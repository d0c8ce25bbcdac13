"""Filters and shuffled variants."""

from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubetuner.config.sections.captions import CaptionShuffle, DatasetCaptions
from kubetuner.data.caption_edits import edit_captions


def filtered(caption: str, *filters: str) -> str:
    (text,) = edit_captions(DatasetCaptions(id="a", filters=filters), [caption])
    return text


def shuffled(caption: str, **settings: Any) -> tuple[str, ...]:
    return edit_captions(DatasetCaptions(id="a", shuffle=CaptionShuffle(**settings)), [caption])


@pytest.mark.parametrize(
    ("caption", "filters", "expected"),
    [
        ("arafed image of arafed dogs", ("arafed ",), "image of dogs"),
        ("this dog has a hat", ("this .* has a",), "hat"),
        ("a photo of a photo", ("^a photo of ",), "a photo"),
        ("this and this", ("s/this/that/",), "that and this"),
        ("this and this", ("s/this/that/g",), "that and that"),
        ("this and this", ("s/this/that",), "that and this"),
        ("w/h and w/h", (r"s/w\/h/wide\/high/",), "wide/high and w/h"),
        ("red dog", (r"s/(\w+) (\w+)/\2 \1/",), "dog red"),
        ("a (small dog", ("(small ",), "a dog"),
        ("one two", ("s/one/two/", "two",), ""),
        ("犬の写真", ("の写真",), "犬"),
        ("unchanged  text", ("absent",), "unchanged  text"),
    ],
)  # fmt: skip
def test_filters(caption: str, filters: tuple[str, ...], expected: str) -> None:
    assert filtered(caption, *filters) == expected


def test_captions_that_become_equal_are_kept_once() -> None:
    settings = DatasetCaptions(id="a", filters=("big |small ",))
    assert edit_captions(settings, ["a big dog", "a small dog", "a cat"]) == ("a dog", "a cat")


def test_nothing_to_do_changes_nothing() -> None:
    assert edit_captions(DatasetCaptions(id="a"), [" two ", "", "two"]) == (" two ", "", "two")


def test_variants_keep_the_first_tags_and_every_tag() -> None:
    found = shuffled("dog, running, park,sunny day", count=20, position_start=1)
    assert found[0] == "dog, running, park,sunny day"
    orders = {", ".join(["dog", *rest]) for rest in permutations(["running", "park", "sunny day"])}
    assert set(found[1:]) == orders  # 20 draws of 6
    assert shuffled("dog, running, park,sunny day", count=20, position_start=1) == found
    assert shuffled("dog, running, park, sunny day", count=3, seed=1) != shuffled(
        "dog, running, park, sunny day", count=3, seed=2
    )


@pytest.mark.parametrize(
    ("settings", "caption", "expected"),
    [
        ({"split_on": "space", "count": 30}, "red dog", {"red dog", "dog red"}),
        ({"split_on": "period", "count": 30}, "A dog. It runs.", {"A dog. It runs.", "It runs. A dog."}),
        ({"split_on": "period", "count": 30}, "A dog. It runs", {"A dog. It runs", "It runs. A dog"}),
        ({"position_start": 1, "count": 30}, "a, b", {"a, b"}),
        ({"include_original": False, "count": 30}, "a,b", {"a, b", "b, a"}),
        ({"include_original": False}, "alone", {"alone"}),
        ({}, "", {""}),
    ],
)
def test_what_can_be_shuffled(settings: dict[str, Any], caption: str, expected: set[str]) -> None:
    assert set(shuffled(caption, **settings)) == expected


@given(st.text(), st.integers(1, 5), st.integers(0, 3), st.sampled_from(["comma", "space", "period"]), st.booleans())
def test_there_is_always_a_text_and_none_twice(caption: str, count: int, fixed: int, mark: str, original: bool) -> None:
    found = shuffled(caption, count=count, position_start=fixed, split_on=mark, include_original=original)
    assert 1 <= len(found) <= count + original
    assert len(set(found)) == len(found)
