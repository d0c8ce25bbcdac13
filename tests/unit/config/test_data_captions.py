"""``caption_filter_list`` and ``caption_shuffle``: from the data file to the section."""

import json

import pytest

from kubetuner.config.load import load
from kubetuner.config.sections.captions import CaptionShuffle
from kubetuner.errors import ConfigError

CONFIG = {"model_type": "full", "model_family": "sdxl", "seed": 9}


def image(**more):
    return {"id": "a", "instance_data_dir": "pictures", **more}


def texts(**more):
    return {"id": "t", "dataset_type": "text_embeds", **more}


def captions(*entries, cwd=None):
    run = load(CONFIG, list(entries), **({"cwd": cwd} if cwd else {}))
    return {one.id: one for one in run.sections.cache_text_embeds.captions}


def problems_of(*entries, cwd=None):
    with pytest.raises(ConfigError) as caught:
        captions(*entries, cwd=cwd)
    return {problem.where.removeprefix("multidatabackend.json"): problem.message for problem in caught.value.problems}


def test_captions_that_stay_as_they_are_are_no_setting() -> None:
    assert captions(image(), texts()) == {}
    assert captions(image(caption_shuffle={"enable": False, "count": 3}), texts(caption_filter_list=[])) == {}


def test_a_dataset_has_the_filters_of_its_text_entry() -> None:
    first = texts(caption_filter_list=["one"])
    second = texts(id="u", caption_filter_list=["two"], default=True)
    third = texts(id="v", caption_filter_list=["three"])
    found = captions(image(), image(id="b", text_embeds="t"), first, second, third)
    assert {name: one.filters for name, one in found.items()} == {"a": ("two",), "b": ("one",)}
    assert captions(image(), first)["a"].filters == ("one",)
    assert captions(image(), first, texts(id="u"))["a"].filters == ("one",)
    (note,) = load(CONFIG, [image(), second, third]).notes
    assert note == "multidatabackend.json[2].`caption_filter_list`: no dataset names this entry"


def test_filters_come_from_a_list_or_a_file(tmp_path) -> None:
    filters = ("arafed ", "this .* has a", "^a start", "s/this/that/", "日本")
    (tmp_path / "filters.txt").write_text("\n".join(filters) + "\n\n", encoding="utf-8")
    (tmp_path / "filters.json").write_text(json.dumps(filters), encoding="utf-8")
    for given in (list(filters), "filters.txt", "filters.json", str(tmp_path / "filters.txt")):
        assert captions(image(), texts(caption_filter_list=given), cwd=tmp_path)["a"].filters == filters


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent.txt", "absent.txt cannot be read (No such file"),
        ("broken.json", "broken.json cannot be read"),
        ("object.json", "is a dict; expected a list of strings or a path"),
        ("latin.txt", "latin.txt cannot be read"),
        (7, "is a int; expected a list"),
        (["fine", 7], "holds 7, which is not a string"),
        (["s/only"], "holds 's/only', which begins with s/ and is not s/search/replacement/"),
        (["s/a/b/i"], "not s/search/replacement/"),
        (["s//b/"], "not s/search/replacement/"),
        (["s/(/b/"], "not a valid replacement"),
        ([r"s/a/\1/"], "not a valid replacement"),
    ],
)
def test_filters_are_refused_with_a_reason(tmp_path, given, message) -> None:
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "latin.txt").write_bytes("Stück".encode("latin-1"))
    found = problems_of(image(), texts(caption_filter_list=given), cwd=tmp_path)
    assert list(found) == ["[1].caption_filter_list"]
    assert message in found["[1].caption_filter_list"]


def test_filters_belong_to_text_entries() -> None:
    assert "dataset_type text_embeds" in problems_of(image(caption_filter_list=["a"]))["[0].caption_filter_list"]


def test_shuffle() -> None:
    found = captions(image(caption_shuffle={"enable": True}), image(id="b"))
    assert found["a"].shuffle == CaptionShuffle(seed=9)
    assert found.keys() == {"a"}
    given = {
        "enable": True, "count": 3, "seed": 1, "split_on": "period", "position_start": 2, "include_original": False,
    }  # fmt: skip
    chosen = captions(image(caption_shuffle=given))["a"].shuffle
    expected = CaptionShuffle(count=3, seed=1, split_on="period", position_start=2, include_original=False)
    assert chosen == expected


@pytest.mark.parametrize(
    ("given", "where", "message"),
    [
        (True, "", "expected an object"),
        ({"enable": True, "count": 0}, ".count", "at least 1"),
        ({"enable": "yes"}, ".enable", "true or false"),
        ({"enable": True, "split_on": ";"}, ".split_on", "'comma' or 'space' or 'period'"),
        ({"enable": True, "position": 1}, ".position", "did you mean 'position_start'"),
    ],
)
def test_shuffle_is_refused_with_a_reason(given, where, message) -> None:
    found = problems_of(image(caption_shuffle=given))
    assert list(found) == [f"[0].caption_shuffle{where}"]
    assert message in found[f"[0].caption_shuffle{where}"]
