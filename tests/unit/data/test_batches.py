import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kubetuner.artifacts import LatentsArtifact, read_artifact, write_artifact
from kubetuner.config.sections.steps import DatasetSampling, ModelRef, TrainSection
from kubetuner.data import encoded_samples
from kubetuner.data.batches import Batch, Batches
from kubetuner.errors import ArtifactError, DatasetError
from tests.unit.data.conftest import Encoded, encoded, write_latents, write_texts

COUNTS = {
    "a": {(64, 64): 7, (128, 64): 4, (64, 128): 1},
    "b": {(64, 64): 11},
}
CAPTIONS = ("one", "three", "two")
SAMPLES = encoded(COUNTS, CAPTIONS)
NAMES = ("embeds", "ids")


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBETUNER_STORE", raising=False)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    root = tmp_path_factory.mktemp("caches")
    return [write_latents(root / "latents", SAMPLES)], [write_texts(root / "texts", SAMPLES)]


_settings = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "train_batch_size": st.integers(1, 4),
        "gradient_accumulation_steps": st.integers(1, 3),
        "data_backend_sampling": st.sampled_from(["auto-weighting", "uniform"]),
        "datasets": st.tuples(
            st.builds(DatasetSampling, id=st.just("a"), repeats=st.integers(0, 3), probability=st.floats(0.1, 1)),
            st.builds(DatasetSampling, id=st.just("b"), repeats=st.integers(0, 3), probability=st.floats(0.1, 1)),
        ),
    }
)


@given(changes=_settings, epoch=st.integers(0, 3))
@settings(max_examples=60)
def test_an_epoch_visits_every_sample_as_often_as_repeats_say(
    caches: tuple[list[Path], list[Path]], changes: dict[str, Any], epoch: int
) -> None:
    section = _section(**changes)
    size = section.train_batch_size
    feed = Batches(section, *caches, NAMES)

    epoch_batches = _epoch(feed, section, epoch)

    visits = Counter(row.sample for batch in epoch_batches for row in batch.rows)
    for dataset in section.datasets:
        for target, count in COUNTS[dataset.id].items():
            uses = count * (dataset.repeats + 1)
            seen = {one.sample: visits[one.sample] for one in SAMPLES if _bucket(one) == (dataset.id, target)}
            assert sum(seen.values()) == uses // size * size
            assert max(seen.values()) <= dataset.repeats + 1
            if uses % size == 0:
                assert set(seen.values()) == {dataset.repeats + 1}
    for batch in epoch_batches:
        assert len(batch.rows) == len(batch.texts) == size
        assert len({(row.dataset, row.target_size) for row in batch.rows}) == 1
        width, height = batch.rows[0].target_size
        numbers = {one.sample: one.number for one in SAMPLES}
        expected = [torch.full((2, height // 8, width // 8), numbers[row.sample]) for row in batch.rows]
        assert batch.latents.dtype == torch.float32
        assert torch.equal(batch.latents, torch.stack(expected))


@given(changes=_settings, positions=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), min_size=1, max_size=8))
@settings(max_examples=30)
def test_a_batch_depends_on_seed_and_position_alone(
    caches: tuple[list[Path], list[Path]], changes: dict[str, Any], positions: list[tuple[int, int]]
) -> None:
    """Asked in any order, by a run that goes on or by one that was resumed."""
    section = _section(**changes)
    other_accumulation = section.model_copy(update={"gradient_accumulation_steps": 1})
    one, other = Batches(section, *caches, NAMES), Batches(other_accumulation, *caches, NAMES)
    steps = section.gradient_accumulation_steps

    for step, micro in positions:
        batch = one.batch(step, micro % steps)
        resumed = Batches(section, *caches, NAMES).batch(step, micro % steps)
        assert _contents(batch) == _contents(resumed) == _contents(other.batch(step * steps + micro % steps, 0))


def test_how_the_caches_are_cut_up_and_ordered_does_not_matter(
    caches: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    parts = [list(reversed(SAMPLES[start::3])) for start in (2, 0, 1)]
    latents = [write_latents(tmp_path / f"latents{place}", part, part=(place, 3)) for place, part in enumerate(parts)]
    texts = [write_texts(tmp_path / f"texts{place}", part, part=(place, 3)) for place, part in enumerate(parts)]
    section = _section(train_batch_size=2)
    whole, cut = Batches(section, *caches, NAMES), Batches(section, latents, texts, NAMES)

    assert whole.batches_per_epoch == cut.batches_per_epoch
    for step in range(25):
        assert _contents(whole.batch(step, 0)) == _contents(cut.batch(step, 0))


def test_epochs_and_seeds_are_shuffled_differently(caches: tuple[list[Path], list[Path]]) -> None:
    orders = set()
    for seed in range(3):
        section = _section(seed=seed)
        feed = Batches(section, *caches, NAMES)
        orders |= {tuple(batch.rows[0].sample for batch in _epoch(feed, section, epoch)) for epoch in range(3)}

    assert len(orders) == 9
    assert len({frozenset(order) for order in orders}) == 1


def test_who_misses_an_epoch_changes(caches: tuple[list[Path], list[Path]]) -> None:
    section = _section(train_batch_size=4, datasets=(DatasetSampling(id="b"),))  # 11 samples: 3 are left over.
    feed = Batches(section, *caches, NAMES)
    everyone = {one.sample for one in SAMPLES if one.dataset == "b"}

    missing = [
        everyone - {row.sample for batch in _epoch(feed, section, epoch) for row in batch.rows} for epoch in range(12)
    ]

    assert [len(left_out) for left_out in missing] == [3] * 12
    assert set.union(*missing) == everyone


@pytest.mark.parametrize(
    ("sampling", "probability", "share"),
    [
        ("auto-weighting", 1.0, 30 / 40),
        ("auto-weighting", 0.5, 15 / 25),
        ("uniform", 1.0, 1 / 2),
        ("uniform", 0.25, 1 / 5),
    ],
)
def test_datasets_take_turns_by_their_weight(tmp_path: Path, sampling: str, probability: float, share: float) -> None:
    """The share of epochs whose first batch is of dataset a, which is three times as large."""
    samples = encoded({"a": {(64, 64): 30}, "b": {(64, 64): 10}})
    datasets = (DatasetSampling(id="a", probability=probability), DatasetSampling(id="b"))
    section = _section(datasets=datasets, data_backend_sampling=sampling)
    feed = Batches(section, [write_latents(tmp_path / "l", samples)], [write_texts(tmp_path / "t", samples)], NAMES)

    firsts = [feed.batch(40 * epoch, 0).rows[0].dataset for epoch in range(400)]

    assert feed.batches_per_epoch == 40
    assert firsts.count("a") / 400 == pytest.approx(share, abs=0.07)  # 2.8 standard deviations.


@pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
def test_captions_are_dropped_and_drawn_by_chance(caches: tuple[list[Path], list[Path]], dropout: float) -> None:
    feed = Batches(_section(train_batch_size=4, caption_dropout_probability=dropout), *caches, NAMES)

    texts = [text for step in range(750) for text in feed.batch(step, 0).texts]

    dropped = texts.count(None)
    assert dropped / 3000 == pytest.approx(dropout, abs=0.025 if 0 < dropout < 1 else 0)
    drawn = Counter(int(text["ids"].item()) for text in texts if text is not None)
    for place in (1, 2, 3) if dropout < 1 else ():  # The empty text is at place 0.
        assert drawn[place] / (3000 - dropped) == pytest.approx(1 / 3, abs=0.03)
    assert drawn[0] == 0


def test_texts_come_with_their_sample_and_as_float32(tmp_path: Path) -> None:
    samples = [Encoded(f"a/{number}.png", (64, 64), float(number), (f"text {number}",)) for number in range(6)]
    texts = [write_texts(tmp_path / "texts", samples, dtype=torch.bfloat16)]
    section = _section(datasets=(DatasetSampling(id="a"),), train_batch_size=3)
    feed = Batches(section, [write_latents(tmp_path / "latents", samples)], texts, NAMES)

    for step in range(4):
        batch = feed.batch(step, 0)
        for row, text in zip(batch.rows, batch.texts, strict=True):
            assert text is not None
            assert text["embeds"].dtype == torch.float32
            assert text["embeds"].item() == 1 + int(row.sample[2])
            assert text["ids"].dtype == torch.int64
    assert feed.null["embeds"].item() == 0


def test_a_small_memory_changes_nothing(caches: tuple[list[Path], list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Batches(_section(), *caches, NAMES)
    monkeypatch.setattr(encoded_samples, "MEMORY_BUDGET_BYTES", 700)  # Two samples and a few texts.
    read = Batches(_section(), *caches, NAMES)

    for step in range(30):
        assert _contents(kept.batch(step, 0)) == _contents(read.batch(step, 0))


def test_a_bucket_that_cannot_fill_a_batch_is_named(
    caches: tuple[list[Path], list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    section = _section(train_batch_size=3)
    with caplog.at_level(logging.WARNING):
        feed = Batches(section, *caches, NAMES)

    assert caplog.messages == [
        "dataset a: the 1 samples of bucket 64x128, used 1 time(s) each, do not fill a batch of 3: left out"
    ]
    assert feed.batches_per_epoch == 7 // 3 + 4 // 3 + 11 // 3


def test_datasets_that_cannot_fill_a_batch_are_all_named_with_a_way_out(caches: tuple[list[Path], list[Path]]) -> None:
    datasets = (
        DatasetSampling(id="a", repeats=1), DatasetSampling(id="b", repeats=0), DatasetSampling(id="missing")
    )  # fmt: skip
    with pytest.raises(DatasetError) as error:
        Batches(_section(train_batch_size=16, datasets=datasets), *caches, NAMES)

    assert str(error.value).split("; ") == [
        "dataset 'a' cannot fill one batch of 16: its buckets hold 64x64: 7, 64x128: 1, 128x64: 4 samples, used 2 "
        "time(s) each",
        "set repeats to 2 or train_batch_size to 14",
        "dataset 'b' cannot fill one batch of 16: its buckets hold 64x64: 11 samples, used 1 time(s) each",
        "set repeats to 1 or train_batch_size to 11",
        "dataset 'missing' has no usable samples",
    ]


@pytest.mark.parametrize(("repeats", "size"), [(2, 16), (1, 14)])
def test_either_way_out_fills_a_batch(caches: tuple[list[Path], list[Path]], repeats: int, size: int) -> None:
    datasets = (DatasetSampling(id="a", repeats=repeats),)
    assert Batches(_section(train_batch_size=size, datasets=datasets), *caches, NAMES).batches_per_epoch == 1
    with pytest.raises(DatasetError):
        Batches(_section(train_batch_size=7 * (repeats + 1) + 1, datasets=datasets), *caches, NAMES)


def test_caches_of_different_datasets_are_refused(caches: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    other = write_texts(tmp_path / "other", SAMPLES, parent="another dataset")

    with pytest.raises(ArtifactError, match=rf"{caches[0][0]} and {other} were made of different datasets; run"):
        Batches(_section(), caches[0], [other], NAMES)


@pytest.mark.parametrize(
    ("chosen", "named"),
    [((0,), "0 of 2"), ((1,), "1 of 2"), ((0, 0), "0 of 2, 0 of 2"), ((0, 1, 1), "0 of 2, 1 of 2, 1 of 2")],
)
def test_parts_that_are_missing_or_come_twice_are_refused(tmp_path: Path, chosen: tuple[int, ...], named: str) -> None:
    """Of both kinds the same parts: no sample lacks its caption."""
    halves = [SAMPLES[start::2] for start in (0, 1)]
    latents = [write_latents(tmp_path / f"l{place}", half, part=(place, 2)) for place, half in enumerate(halves)]
    texts = [write_texts(tmp_path / f"t{place}", half, part=(place, 2)) for place, half in enumerate(halves)]
    Batches(_section(), latents, texts, NAMES)
    some = [[folders[place] for place in chosen] for folders in (latents, texts)]
    with pytest.raises(ArtifactError, match=rf"cache_vae was given as the parts {named} .* give each part once"):
        Batches(_section(), some[0], texts, NAMES)
    with pytest.raises(ArtifactError, match=rf"cache_text_embeds was given as the parts {named} "):
        Batches(_section(), latents, some[1], NAMES)


def test_latents_that_were_left_out_are_noticed(tmp_path: Path) -> None:
    parts = [write_latents(tmp_path / f"{start}", SAMPLES[start::2]) for start in (0, 1)]
    texts = [write_texts(tmp_path / "texts", SAMPLES)]
    with pytest.raises(ArtifactError, match=r"11 samples such as a/128x64-0.png have captions and no latents"):
        Batches(_section(), parts[:1], texts, NAMES)


def test_captions_that_were_left_out_are_noticed(caches: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", SAMPLES[1:])

    with pytest.raises(ArtifactError, match=r"1 samples such as a/64x64-0.png have no caption; run cache_text_embeds"):
        Batches(_section(), caches[0], [texts], NAMES)


def test_a_sample_that_cache_vae_skipped_is_not_missed(tmp_path: Path) -> None:
    latents = write_latents(tmp_path / "latents", SAMPLES[1:], skipped=[SAMPLES[0].sample])
    feed = Batches(_section(), [latents], [write_texts(tmp_path / "texts", SAMPLES)], NAMES)

    assert feed.batches_per_epoch == len(SAMPLES) - 1


@pytest.mark.parametrize("step", ["latents", "texts"])
def test_damage_is_named_before_training_starts(tmp_path: Path, step: str) -> None:
    folders = {
        "latents": write_latents(tmp_path / "latents", SAMPLES), "texts": write_texts(tmp_path / "texts", SAMPLES)
    }  # fmt: skip
    (shard,) = (folders[step] / "shards").iterdir()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=rf"{shard} is damaged"):
        Batches(_section(), [folders["latents"]], [folders["texts"]], NAMES)

    shard.write_bytes(whole)
    rows = folders[step] / f"{step}.jsonl"
    rows.write_text(rows.read_text()[:-20])
    with pytest.raises(ArtifactError, match=rf"1 missing or damaged file\(s\): {rows.name}"):
        Batches(_section(), [folders["latents"]], [folders["texts"]], NAMES)


def test_a_cache_of_another_kind_or_version_is_refused(caches: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    latents, texts = caches
    with pytest.raises(ArtifactError, match="is a 'text_embeds' artifact; expected 'latents'"):
        Batches(_section(), texts, latents, NAMES)

    newer = write_latents(tmp_path / "newer", SAMPLES)
    write_artifact(newer, read_artifact(newer, LatentsArtifact).model_copy(update={"schema_version": 2}))
    with pytest.raises(ArtifactError, match="was not written by this version"):
        Batches(_section(), [newer], texts, NAMES)


def _section(**changes: object) -> TrainSection:
    values: dict[str, object] = {
        "model": ModelRef(family="sana", path="unused"),
        "model_type": "full",
        "datasets": (DatasetSampling(id="a"), DatasetSampling(id="b")),
        "max_train_steps": 1,
        "train_batch_size": 1,
        "caption_dropout_probability": 0.0,
    }
    return TrainSection.model_validate(values | changes)


def _epoch(feed: Batches, section: TrainSection, epoch: int) -> list[Batch]:
    positions = range(epoch * feed.batches_per_epoch, (epoch + 1) * feed.batches_per_epoch)
    return [feed.batch(*divmod(position, section.gradient_accumulation_steps)) for position in positions]


def _bucket(sample: Encoded) -> tuple[str, tuple[int, int]]:
    return sample.dataset, sample.size


def _contents(batch: Batch) -> tuple[Sequence[str], list[float], list[float | None]]:
    """What decides a batch, without the shards it was read from."""
    texts = [None if text is None else text["embeds"].item() for text in batch.texts]
    return [row.sample for row in batch.rows], batch.latents[:, 0, 0, 0].tolist(), texts
