"""Caption strategies."""

from pathlib import Path
from typing import Any

import pytest

from kubetuner.config.sections.sources import DatasetSource
from kubetuner.data.captions import CaptionError, captions_for
from kubetuner.sources.base import Item
from kubetuner.sources.local import LocalSource


def captions(root: Path, picture: str, **settings: Any) -> tuple[str, ...]:
    source = DatasetSource.model_validate({"id": "set", "instance_data_dir": str(root), **settings})
    local = LocalSource(source)
    return captions_for(source, Item(picture), local.listing(), local)


@pytest.mark.parametrize(
    ("name", "caption"),
    [("a_red_ring.png", "a red ring"), ("deep/er/a_ring.v2.jpg", "a ring.v2"), ("plain.webp", "plain"), ("_.png", "")],
)
def test_filename(tmp_path: Path, name: str, caption: str) -> None:
    assert captions(tmp_path, name) == (caption,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a ring", ("a ring",)),
        (b"a ring\nthe ring\r\n\n  one ring  \n", ("a ring", "the ring", "one ring")),
        (b"", ("",)),
        (b"\n\n", ("",)),
        ("\ufeffein Stück".encode(), ("ein Stück",)),
        ("one\u2028ring\x0bto\nrule".encode(), ("one\u2028ring\x0bto", "rule")),
    ],
)
def test_textfile(tmp_path: Path, text: bytes, expected: tuple[str, ...]) -> None:
    (tmp_path / "a.b.txt").write_bytes(text)
    assert captions(tmp_path, "a.b.png", caption_strategy="textfile") == expected


def test_a_text_file_may_be_one_caption(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a ring\n\nof gold\n")
    whole = captions(tmp_path, "a.png", caption_strategy="textfile", disable_multiline_split=True)
    assert whole == ("a ring\n\nof gold",)


def test_a_missing_text_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptionError) as caught:
        captions(tmp_path, "sub/a.png", caption_strategy="textfile")
    assert caught.value.reason == "caption file sub/a.txt is missing"


def test_a_text_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Stück".encode("latin-1"))
    with pytest.raises(CaptionError, match=r"a.txt is not UTF-8 .* at byte 2"):
        captions(tmp_path, "a.png", caption_strategy="textfile")


def test_a_text_file_that_has_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.txt").touch()
    settings = DatasetSource(id="set", instance_data_dir=str(tmp_path), caption_strategy="textfile")
    local = LocalSource(settings)
    listing = local.listing()
    (tmp_path / "b.txt").unlink()
    with pytest.raises(CaptionError, match=r"b.txt cannot be read \(No such file"):
        captions_for(settings, Item("b.png"), listing, local)


def test_the_source_s_own_captions(tmp_path: Path) -> None:
    settings = DatasetSource(id="set", instance_data_dir=str(tmp_path), type="csv", caption_strategy="csv")
    local = LocalSource(settings)
    listing = local.listing()
    assert captions_for(settings, Item("a", captions=("one", "")), listing, local) == ("one", "")
    with pytest.raises(CaptionError, match="holds no caption for it"):
        captions_for(settings, Item("a"), listing, local)


def test_instance_prompt(tmp_path: Path) -> None:
    prompts = ("a sks ring", "sks")
    assert captions(tmp_path, "a.png", caption_strategy="instanceprompt", instance_prompt=prompts) == prompts
    assert captions(tmp_path, "a.png", instance_prompt=prompts, only_instance_prompt=True) == prompts


def test_prepend(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert captions(tmp_path, "a_b.png", instance_prompt=("sks",), prepend_instance_prompt=True) == ("sks a b",)
    both = captions(
        tmp_path, "a.png", caption_strategy="textfile", instance_prompt=("x", "y"), prepend_instance_prompt=True
    )
    assert both == ("x one", "x two", "y one", "y two")


def test_only_beats_prepend(tmp_path: Path) -> None:
    got = captions(tmp_path, "a.png", instance_prompt=("x",), prepend_instance_prompt=True, only_instance_prompt=True)
    assert got == ("x",)


def test_an_instance_prompt_is_asked_for(tmp_path: Path) -> None:
    for settings in (
        {"caption_strategy": "instanceprompt"},
        {"only_instance_prompt": True},
        {"prepend_instance_prompt": True},
    ):
        with pytest.raises(CaptionError, match="'set' has no instance_prompt"):
            captions(tmp_path, "a.png", **settings)


def test_an_instance_prompt_without_a_use_is_left_alone(tmp_path: Path) -> None:
    assert captions(tmp_path, "a.png", instance_prompt=("x",)) == ("a",)
