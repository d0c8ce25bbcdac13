import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kubetuner.artifacts import (
    CaptionRow,
    TensorSpec,
    TextEmbedsArtifact,
    TextRow,
    read_artifact,
    read_rows,
    verify_files,
)
from kubetuner.config.sections.steps import CacheTextSection, ModelRef
from kubetuner.data.shards import ShardReader
from kubetuner.errors import ArtifactError
from kubetuner.families import load_family
from kubetuner.families.text_encoding import encode_texts
from kubetuner.steps import cache_text_embeds as module
from kubetuner.steps.cache_text_embeds import cache_text_embeds
from kubetuner.store import Store, resolve_store
from tests.unit.conftest import fork, wait
from tests.unit.steps.conftest import FAMILIES, Download, picture, pictures

CAPTIONS = ("a red ring", "a red ring on a blue background, and many more words about it", "star")
INSTRUCTIONS = {"pixart_sigma": "", "sdxl": "", "sana": "Describe: "}


@pytest.mark.usefixtures("no_store")
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_what_the_family_encodes(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, family: str
) -> None:
    section, out = _section(bases[family], instruction=INSTRUCTIONS[family]), tmp_path / "out"

    artifact = cache_text_embeds(section, download(_captioned(*CAPTIONS)), out)

    assert artifact == read_artifact(out, TextEmbedsArtifact)
    verify_files(out, artifact)
    assert (artifact.num_texts, artifact.encoded, artifact.reused) == (4, 4, 0)
    texts = _texts(out)
    assert texts.keys() == {"", *CAPTIONS}
    made = load_family(bases[family].family)
    encoders = made.load_text_encoders(section.model, torch.device("cpu"))
    for text, tensors in texts.items():
        (expected,) = encode_texts(made, encoders, [text], section)
        assert tensors.keys() == expected.keys() == set(made.facts.text_tensors)
        for name in expected:
            torch.testing.assert_close(tensors[name], expected[name], rtol=0, atol=5e-6)


@pytest.mark.usefixtures("no_store")
@pytest.mark.parametrize("family", ["pixart_sigma", "sana"])
def test_sequences_are_trimmed_to_their_text(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, family: str
) -> None:
    dataset = download(_captioned(*CAPTIONS))
    artifact = cache_text_embeds(_section(bases[family]), dataset, tmp_path / "out")

    lengths = {text: len(tensors["embeds"]) for text, tensors in _texts(tmp_path / "out").items()}
    assert artifact.tensors == {"embeds": TensorSpec(dtype="fp32", shape=(None, 16))}
    assert 1 <= lengths[""] < lengths["star"] < lengths[CAPTIONS[0]] < lengths[CAPTIONS[1]] < 300
    cache_text_embeds(_section(bases[family], max_length=6), dataset, tmp_path / "short")
    shorter = {text: len(tensors["embeds"]) for text, tensors in _texts(tmp_path / "short").items()}
    assert shorter == {text: min(length, 6) for text, length in lengths.items()}
    assert shorter[CAPTIONS[1]] == 6


@pytest.mark.usefixtures("no_store")
def test_clip_is_not_trimmed(tmp_path: Path, bases: dict[str, ModelRef], download: Download) -> None:
    artifact = cache_text_embeds(_section(bases["sdxl"]), download(_captioned(*CAPTIONS)), tmp_path / "out")

    assert artifact.tensors == {
        "embeds": TensorSpec(dtype="fp32", shape=(77, 32)),
        "pooled": TensorSpec(dtype="fp32", shape=(16,)),
    }
    assert not _texts(tmp_path / "out")[""]["embeds"].any()  # The base's pipeline draws without text from zeros.


@pytest.mark.usefixtures("no_store")
def test_alternatives_and_repeated_captions(tmp_path: Path, bases: dict[str, ModelRef], download: Download) -> None:
    """A caption file of several lines holds alternatives; a text that many pictures have is encoded once."""
    files = {f"a/{number}.png": picture(number) for number in range(4)}
    captions = {"a/0.txt": "one\ntwo\nthree", "a/1.txt": "two", "a/2.txt": "two", "a/3.txt": ""}

    artifact = cache_text_embeds(_section(bases["sana"]), download(files | captions), tmp_path / "out")

    assert (artifact.num_texts, artifact.encoded) == (4, 4)
    assert sum(shard.samples for shard in artifact.shards) == 4
    rows = {row.sample: row.texts for row in read_rows(tmp_path / "out", "captions.jsonl", CaptionRow)}
    assert rows == {
        "a/0.png": ("one", "two", "three"), "a/1.png": ("two",), "a/2.png": ("two",), "a/3.png": ("",)
    }  # fmt: skip
    texts = list(read_rows(tmp_path / "out", "texts.jsonl", TextRow))
    assert sorted(row.text for row in texts) == ["", "one", "three", "two"]
    assert len({row.key for row in texts}) == 4


@pytest.mark.usefixtures("shared_store")
def test_only_what_is_new_is_encoded(tmp_path: Path, bases: dict[str, ModelRef], download: Download) -> None:
    section = _section(bases["sdxl"])
    first = cache_text_embeds(section, download(_captioned(*CAPTIONS)), tmp_path / "1")
    assert (first.encoded, first.reused) == (4, 0)

    again = cache_text_embeds(section, download(_captioned(*CAPTIONS)), tmp_path / "2")
    assert again == first.model_copy(update={"encoded": 0, "reused": 4})

    more = cache_text_embeds(section, download(_captioned(*CAPTIONS, "new", "newer")), tmp_path / "3")
    assert (more.encoded, more.reused, more.num_texts) == (2, 4, 6)

    renamed = {name.replace("a/", "b/x"): content for name, content in _captioned(*CAPTIONS).items()}
    assert cache_text_embeds(section, download(renamed), tmp_path / "4").encoded == 0


@pytest.mark.usefixtures("shared_store")
def test_a_change_costs_all_texts_unless_it_only_changes_speed(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download
) -> None:
    dataset, base = download(_captioned(*CAPTIONS)), _section(bases["sana"])
    first = cache_text_embeds(base, dataset, tmp_path / "first")
    other = bases["sana"].model_copy(update={"revision": "s"})
    changes: dict[str, tuple[object, int]] = {
        "text_encoder_batch_size": (1, 0), "max_length": (20, 4), "instruction": ("Describe: ", 4),
        "dtype": ("bf16", 4), "model": (other, 4),
    }  # fmt: skip
    for name, (value, count) in changes.items():
        section = base.model_copy(update={name: value})
        artifact = cache_text_embeds(section, dataset, tmp_path / name)
        assert (name, artifact.encoded, artifact.reused) == (name, count, 4 - count)
        assert (artifact.fingerprint == first.fingerprint) == (count == 0)
        assert cache_text_embeds(section, dataset, tmp_path / name).encoded == 0


@pytest.mark.usefixtures("no_store")
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_changes_rounding_and_shards_nothing(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, family: str
) -> None:
    captions = [f"{words} number {number}" for number, words in enumerate(CAPTIONS * 4)]
    dataset = download(_captioned(*captions))
    cache_text_embeds(_section(bases[family]), dataset, tmp_path / "whole")
    expected = _texts(tmp_path / "whole")
    for size in (1, 5):
        cache_text_embeds(_section(bases[family], text_encoder_batch_size=size), dataset, tmp_path / f"b{size}")
        _assert_close(_texts(tmp_path / f"b{size}"), expected)
    found: dict[str, dict[str, Tensor]] = {}
    for shard in range(3):
        artifact = cache_text_embeds(
            _section(bases[family]), dataset, tmp_path / f"{shard}", shard=shard, num_shards=3
        )  # fmt: skip
        part = _texts(tmp_path / f"{shard}")
        assert artifact.num_texts == 5
        assert "" in part
        found |= part
    assert found.keys() == expected.keys()
    for text, tensors in expected.items():
        assert all(torch.equal(found[text][name], tensor) for name, tensor in tensors.items())
    assert _keys(tmp_path / "whole") == {text: key for part in "012" for text, key in _keys(tmp_path / part).items()}


@pytest.mark.usefixtures("no_store")
def test_the_order_of_the_samples_does_not_matter(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TEXTS_PER_SHARD", 2)
    section = _section(bases["pixart_sigma"], text_encoder_batch_size=2)
    artifacts = [
        cache_text_embeds(section, download(_captioned(*order)), tmp_path / name)
        for name, order in {"there": CAPTIONS, "back": CAPTIONS[::-1]}.items()
    ]

    assert artifacts[0].shards == artifacts[1].shards


@pytest.mark.usefixtures("no_store")
def test_a_shard_without_samples_still_has_the_empty_text(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download
) -> None:
    dataset = download(_captioned("one"))

    artifact = cache_text_embeds(_section(bases["sana"]), dataset, tmp_path / "out", shard=1, num_shards=2)

    assert artifact.num_texts == 1
    assert _texts(tmp_path / "out").keys() == {""}
    assert list(read_rows(tmp_path / "out", "captions.jsonl", CaptionRow)) == []


@pytest.mark.usefixtures("no_store")
def test_bf16_is_the_rounded_float32(tmp_path: Path, bases: dict[str, ModelRef], download: Download) -> None:
    dataset = download(_captioned(*CAPTIONS))
    cache_text_embeds(_section(bases["sdxl"]), dataset, tmp_path / "fp32")
    artifact = cache_text_embeds(_section(bases["sdxl"], dtype="bf16"), dataset, tmp_path / "bf16")

    assert {spec.dtype for spec in artifact.tensors.values()} == {"bf16"}
    exact, half = _texts(tmp_path / "fp32"), _texts(tmp_path / "bf16")
    for text, tensors in half.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, exact[text][name].bfloat16())


@pytest.mark.usefixtures("no_store")
def test_a_damaged_list_of_samples_is_refused(tmp_path: Path, bases: dict[str, ModelRef], download: Download) -> None:
    dataset, out = download(_captioned("one", "two")), tmp_path / "out"
    cache_text_embeds(_section(bases["sana"]), dataset, out)
    rows = dataset / "samples.jsonl"
    rows.write_text(rows.read_text().replace("two", "owt"))

    with pytest.raises(ArtifactError, match=r"samples\.jsonl"):
        cache_text_embeds(_section(bases["sana"]), dataset, out)


def test_a_damaged_shard_is_encoded_again(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, shared_store: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "TEXTS_PER_SHARD", 2)
    dataset, section = download(_captioned(*CAPTIONS)), _section(bases["sana"])
    first = cache_text_embeds(section, dataset, tmp_path / "first")
    whole = _files(shared_store)
    assert [shard.samples for shard in first.shards] == [2, 2]
    Store(shared_store).path(first.shards[0].file).unlink()

    again = cache_text_embeds(section, dataset, tmp_path / "again")

    assert first.shards[0].file in caplog.text
    assert again == first.model_copy(update={"encoded": 2, "reused": 2})
    assert _files(shared_store) == whole


def test_a_killed_run_is_completed_to_the_same_bytes(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TEXTS_PER_SHARD", 4)
    captions = [f"{words} number {number}" for number, words in enumerate(CAPTIONS * 8)]
    dataset, section = download(_captioned(*captions)), _section(bases["pixart_sigma"], text_encoder_batch_size=2)
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "whole"))
    started = time.monotonic()
    whole = cache_text_embeds(section, dataset, tmp_path / "out")
    duration = time.monotonic() - started
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "killed"))
    chance = random.Random(0)
    for _ in range(6):
        child = fork(lambda: cache_text_embeds(section, dataset, tmp_path / "killed out"))
        time.sleep(chance.uniform(0.2, 1) * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    final = cache_text_embeds(section, dataset, tmp_path / "killed out")

    assert final == whole.model_copy(update={"encoded": final.encoded, "reused": final.reused})
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")


def test_two_runs_may_fill_one_store_at_once(
    tmp_path: Path, bases: dict[str, ModelRef], download: Download, shared_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TEXTS_PER_SHARD", 2)
    dataset, section = download(_captioned(*CAPTIONS)), _section(bases["sdxl"])

    children = [fork(lambda out=out: cache_text_embeds(section, dataset, tmp_path / out)) for out in ("1", "2")]

    assert [wait(child) for child in children] == [0, 0]
    for out in ("1", "2"):
        artifact = read_artifact(tmp_path / out, TextEmbedsArtifact)
        ShardReader(resolve_store(tmp_path / out)).verify(artifact.shards)
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "alone"))
    cache_text_embeds(section, dataset, tmp_path / "3")
    assert _files(shared_store) == _files(tmp_path / "alone")


def _section(ref: ModelRef, **settings: object) -> CacheTextSection:
    return CacheTextSection.model_validate({"model": ref, "clean_caption": False, **settings})


def _captioned(*captions: str) -> dict[str, str | bytes]:
    files: dict[str, str | bytes] = {}
    for number, caption in enumerate(captions):
        files |= pictures("a", 1, start=number, caption=caption)
    return files


def _texts(out: Path) -> dict[str, dict[str, Tensor]]:
    """Text → its cached tensors, of an artifact that holds its own shards."""
    stored = {key: tensor for path in (out / "shards").iterdir() for key, tensor in load_file(path).items()}
    found: dict[str, dict[str, Tensor]] = {}
    for row in read_rows(out, "texts.jsonl", TextRow):
        prefix = f"{row.key}."
        found[row.text] = {
            name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)
        }
    return found


def _keys(out: Path) -> dict[str, str]:
    return {row.text: row.key for row in read_rows(out, "texts.jsonl", TextRow)}


def _assert_close(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for text, tensors in expected.items():
        assert found[text].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[text][name], tensor, rtol=0, atol=5e-6)


def _files(root: Path) -> dict[str, bytes]:
    """The finished files of a store."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
