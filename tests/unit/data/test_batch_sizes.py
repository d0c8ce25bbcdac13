"""``train_batch_size`` of a dataset: each has batches of its own size, and all that counts samples knows."""

import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubetuner.config.sections.steps import DatasetSampling, ModelRef, TrainSection
from kubetuner.data.batches import Batches
from kubetuner.errors import DatasetError
from tests.unit.data.conftest import encoded, write_latents, write_texts

COUNTS = {"a": {(64, 64): 7, (128, 64): 4}, "b": {(64, 64): 11}}
NAMES = ("embeds", "ids")
Caches = tuple[list[Path], list[Path]]


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBETUNER_STORE", raising=False)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    root, samples = tmp_path_factory.mktemp("caches"), encoded(COUNTS)
    return [write_latents(root / "latents", samples)], [write_texts(root / "texts", samples)]


def section(*datasets: DatasetSampling, **settings: object) -> TrainSection:
    values = {"model": ModelRef(family="sana", path="unused"), "model_type": "full", "max_train_steps": 30}
    return TrainSection.model_validate(values | {"datasets": datasets} | settings)


@given(
    own=st.tuples(st.none() | st.integers(1, 4), st.none() | st.integers(1, 4)), usual=st.integers(1, 4),
    repeats=st.integers(0, 2), accumulation=st.integers(1, 3), end=st.none() | st.integers(1, 12),
    begin=st.integers(0, 12),
)  # fmt: skip
@settings(max_examples=60)
def test_batches_are_as_large_as_their_dataset_says_and_every_sample_is_counted(
    caches: Caches, own: tuple[int | None, int | None], usual: int, repeats: int, accumulation: int, end: int | None,
    begin: int,
) -> None:  # fmt: skip
    """Also where a dataset comes or goes: the samples before a batch are those that were drawn before it."""
    one = section(
        DatasetSampling(id="a", train_batch_size=own[0], repeats=repeats, end_step=end),
        DatasetSampling(id="b", train_batch_size=own[1], start_step=begin if end is None else min(begin, end)),
        train_batch_size=usual, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    sizes = {"a": own[0] or usual, "b": own[1] or usual}
    feed, fresh = Batches(one, *caches, NAMES), Batches(one, *caches, NAMES)
    seen = 0

    for step in range(16):
        for micro in range(accumulation):
            batch = feed.batch(step, micro)
            assert len(batch.rows) == len(batch.latents) == len(batch.texts) == sizes[batch.rows[0].dataset]
            assert len({(row.dataset, row.target_size) for row in batch.rows}) == 1
            assert batch.before == seen
            seen += len(batch.rows)

    last = fresh.batch(15, accumulation - 1)
    assert (last.rows, last.before) == (batch.rows, batch.before)


def test_an_epoch_is_every_datasets_whole_batches(caches: Caches) -> None:
    one = section(DatasetSampling(id="a", train_batch_size=3), DatasetSampling(id="b"), train_batch_size=5)
    feed = Batches(one, *caches, NAMES)

    assert feed.batches_per_epoch == (7 // 3 + 4 // 3) + 11 // 5
    epoch = [len(feed.batch(step, 0).rows) for step in range(feed.batches_per_epoch)]
    assert sorted(epoch) == [3, 3, 3, 5, 5]
    assert feed.epochs(5) == 1.0


def test_processes_that_take_turns_see_the_batches_of_one(caches: Caches) -> None:
    datasets = DatasetSampling(id="a", train_batch_size=1), DatasetSampling(id="b", train_batch_size=4)
    alone = Batches(section(*datasets, gradient_accumulation_steps=2), *caches, NAMES)
    two = Batches(section(*datasets), *caches, NAMES, processes=2)

    for position in range(40):
        step, micro = divmod(position, 2)
        one, other = alone.batch(step, micro), two.batch(step, micro)
        assert (one.rows, one.before) == (other.rows, other.before)


def test_turns_are_weighted_by_batches(tmp_path: Path) -> None:
    """As in SimpleTuner, whose datasets are as long as they have batches: 30 of 1 against 10 of 3."""
    samples = encoded({"a": {(64, 64): 30}, "b": {(64, 64): 30}})
    one = section(DatasetSampling(id="a", train_batch_size=1), DatasetSampling(id="b", train_batch_size=3))
    feed = Batches(one, [write_latents(tmp_path / "l", samples)], [write_texts(tmp_path / "t", samples)], NAMES)

    firsts = [feed.batch(40 * epoch, 0).rows[0].dataset for epoch in range(300)]

    assert firsts.count("a") / 300 == pytest.approx(30 / 40, abs=0.08)  # 3.2 standard deviations.


def test_a_dataset_that_cannot_fill_its_own_batch_is_named(caches: Caches, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DatasetError) as error:
        Batches(section(DatasetSampling(id="a", train_batch_size=9), DatasetSampling(id="b")), *caches, NAMES)
    assert "dataset 'a' cannot fill one batch of 9" in str(error.value)
    assert "'b'" not in str(error.value)

    with caplog.at_level(logging.WARNING):
        Batches(section(DatasetSampling(id="a", train_batch_size=5), DatasetSampling(id="b")), *caches, NAMES)
    assert caplog.messages == [
        "dataset a: the 4 samples of bucket 128x64, used 1 time(s) each, do not fill a batch of 5: left out"
    ]
