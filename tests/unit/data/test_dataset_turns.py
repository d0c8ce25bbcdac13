"""Which samples training sees, how often, and in which order."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from kubetuner.artifacts import (
    CaptionRow,
    LatentRow,
    LatentsArtifact,
    TextEmbedsArtifact,
    TextRow,
    write_artifact,
    write_rows,
)
from kubetuner.config.sections.steps import DatasetSampling, ModelRef, TrainSection
from kubetuner.data.batches import Batches
from kubetuner.errors import DatasetError
from kubetuner.store import Store

SQUARE, WIDE = (64, 64), (128, 64)


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBETUNER_STORE", raising=False)


def caches(folder: Path, counts: dict[str, dict[tuple[int, int], int]]) -> tuple[list[Path], list[Path]]:
    """Latents (each filled with its sample's number) and texts of datasets with so many samples per size."""
    latents, texts = folder / "latents", folder / "texts"
    places = [(name, size, n) for name, sizes in counts.items() for size, count in sizes.items() for n in range(count)]
    tensors = {
        f"k{number}": {"latents": torch.full((4, size[1] // 8, size[0] // 8), float(number))}
        for number, (_, size, _) in enumerate(places)
    }
    shard = Store(latents).write_shard("l", tensors)
    rows = [
        LatentRow(
            sample=f"{name}/{size[0]}_{n}.png", dataset=name, key=f"k{number}", shard=shard.file,
            intermediary_size=size, crop=(0, 0), target_size=size, bucket=str(size[0] / size[1]),
        )
        for number, (name, size, n) in enumerate(places)
    ]  # fmt: skip
    write_rows(latents, "latents.jsonl", rows)
    made = LatentsArtifact(
        fingerprint="l", parents=("d",), num_samples=len(rows), encoded=0, reused=0, tensors={}, shards=(shard,)
    )
    write_artifact(latents, made)
    keys = {"": "t0", "one": "t1", "two": "t2"}
    shard = Store(texts).write_shard(
        "t", {key: {"embeds": torch.full((2, 3), float(key[1:]))} for key in keys.values()}
    )
    write_rows(texts, "texts.jsonl", [TextRow(text=text, key=key, shard=shard.file) for text, key in keys.items()])
    write_rows(texts, "captions.jsonl", [CaptionRow(sample=row.sample, texts=("one", "two")) for row in rows])
    embeds = TextEmbedsArtifact(
        fingerprint="t", parents=("d",), num_texts=3, encoded=0, reused=0, tensors={}, shards=(shard,)
    )
    write_artifact(texts, embeds)
    return [latents], [texts]


def batches(
    folder: Path, counts: dict[str, dict[tuple[int, int], int]], *datasets: DatasetSampling, **settings: object
) -> Batches:
    values = {
        "model": ModelRef(family="sana", path="base"),
        "model_type": "full",
        "datasets": datasets or tuple(DatasetSampling(id=name) for name in counts),
        "max_train_steps": 100,
        "train_batch_size": 2,
        "caption_dropout_probability": 0.0,
    }
    section = TrainSection.model_validate(values | settings)
    return Batches(section, *caches(folder, counts), ("embeds",))


def drawn(source: Batches, steps: range) -> list[tuple[str, ...]]:
    return [tuple(row.sample for row in source.batch(step, 0).rows) for step in steps]


def datasets_of(source: Batches, steps: range) -> list[str]:
    return [source.batch(step, 0).rows[0].dataset for step in steps]


def test_a_batch_is_of_one_dataset_and_one_size(tmp_path: Path) -> None:
    source = batches(tmp_path, {"a": {SQUARE: 5, WIDE: 4}, "b": {SQUARE: 3}})
    assert source.batches_per_epoch == 2 + 2 + 1
    for step in range(10):
        batch = source.batch(step, 0)
        assert len({(row.dataset, row.target_size) for row in batch.rows}) == 1
        assert batch.latents.shape == (2, 4, batch.rows[0].target_size[1] // 8, batch.rows[0].target_size[0] // 8)
        assert all(float(one.max()) == int(row.key[1:]) for one, row in zip(batch.latents, batch.rows, strict=True))


def test_repeats_are_extra_passes(tmp_path: Path) -> None:
    source = batches(tmp_path, {"a": {SQUARE: 4}, "b": {SQUARE: 2}}, *[
        DatasetSampling(id="a"), DatasetSampling(id="b", repeats=4),
    ])  # fmt: skip
    assert source.batches_per_epoch == 2 + 5
    seen = Counter(sample for batch in drawn(source, range(7)) for sample in batch)
    assert seen == {f"a/64_{n}.png": 1 for n in range(4)} | {f"b/64_{n}.png": 5 for n in range(2)}


def test_repeats_fill_a_batch_and_what_does_not_fill_one_is_named(tmp_path: Path) -> None:
    small = {"a": {SQUARE: 1}}
    seen = drawn(batches(tmp_path / "1", small, DatasetSampling(id="a", repeats=3)), range(2))
    assert seen == [("a/64_0.png", "a/64_0.png")] * 2
    with pytest.raises(DatasetError, match=r"'a' cannot fill one batch of 2: .*64x64: 1 .*set repeats to 1 or"):
        batches(tmp_path / "2", small)


def test_auto_weighting_follows_probability_times_length_and_uniform_probability_alone(tmp_path: Path) -> None:
    counts = {"a": {SQUARE: 2}, "b": {SQUARE: 2}}
    lengths = (DatasetSampling(id="a", repeats=299), DatasetSampling(id="b", repeats=99))
    weighted = (DatasetSampling(id="a", repeats=299, probability=0.5), DatasetSampling(id="b", repeats=299))

    def share(name: str, sampling: tuple[DatasetSampling, ...], how: str, steps: int = 120) -> float:
        source = batches(tmp_path / name, counts, *sampling, data_backend_sampling=how)
        return datasets_of(source, range(steps)).count("a") / steps

    assert share("1", lengths, "auto-weighting") == pytest.approx(0.75, abs=0.1)
    assert share("2", lengths, "uniform") == pytest.approx(0.5, abs=0.1)
    assert share("3", weighted, "auto-weighting") == pytest.approx(1 / 3, abs=0.1)
    assert share("4", weighted, "uniform") == pytest.approx(1 / 3, abs=0.1)


def test_a_dataset_that_ran_out_leaves_the_others_their_turns(tmp_path: Path) -> None:
    source = batches(
        tmp_path, {"a": {SQUARE: 2}, "b": {SQUARE: 20}}, DatasetSampling(id="a", probability=1000.0),
        DatasetSampling(id="b"),
    )  # fmt: skip
    assert datasets_of(source, range(11)) == ["a"] + ["b"] * 10


def test_a_batch_depends_on_its_position_alone(tmp_path: Path) -> None:
    counts = {"a": {SQUARE: 8}, "b": {WIDE: 6}}
    forwards = batches(tmp_path / "1", counts)
    expected = drawn(forwards, range(20))
    backwards = batches(tmp_path / "2", counts)
    assert [drawn(backwards, range(step, step + 1))[0] for step in reversed(range(20))] == expected[::-1]
    assert drawn(batches(tmp_path / "3", counts, seed=7), range(20)) != expected


SCHEDULE = (
    DatasetSampling(id="a", end_step=3),
    DatasetSampling(id="b", start_step=3, end_step=6),
    DatasetSampling(id="c", start_step=7),
)


def test_datasets_come_and_go_with_their_steps(tmp_path: Path) -> None:
    source = batches(tmp_path, {name: {SQUARE: 4} for name in "abc"}, *SCHEDULE)
    names = datasets_of(source, range(20))  # the step with index 2 is the third
    assert names[:2] == ["a"] * 2
    assert names[2] in ("a", "b")
    assert names[3:6] == ["b"] * 3
    assert names[6:] == ["c"] * 14
    again = batches(tmp_path / "again", {name: {SQUARE: 4} for name in "abc"}, *SCHEDULE)
    assert drawn(again, range(5, 20)) == drawn(source, range(5, 20))


def test_every_stage_begins_an_epoch(tmp_path: Path) -> None:
    counts = {"a": {SQUARE: 4}, "b": {SQUARE: 8}}
    both = (DatasetSampling(id="a", end_step=3), DatasetSampling(id="b", start_step=4))
    source = batches(tmp_path, counts, *both, gradient_accumulation_steps=2)
    assert [source.epochs(taken) for taken in (1, 2, 5, 6)] == [0.5, 1.0, 2.5, 3.0]
    assert [source.epochs(taken) for taken in (7, 10, 11)] == [3.25, 4.0, 4.25]
    seen = {sample for batch in range(4) for sample in (r.sample for r in source.batch(3 + batch // 2, batch % 2).rows)}
    assert len(seen) == 8


def test_steps_without_a_dataset_are_an_error(tmp_path: Path) -> None:
    source = batches(tmp_path, {"a": {SQUARE: 4}}, DatasetSampling(id="a", end_step=3))
    with pytest.raises(DatasetError, match="no dataset is drawn from in step 4"):
        source.batch(3, 0)


def test_each_use_draws_one_of_the_captions(tmp_path: Path) -> None:
    source = batches(tmp_path, {"a": {SQUARE: 2}})
    texts = [text for step in range(40) for text in source.batch(step, 0).texts]
    used = Counter(float(text["embeds"].max()) for text in texts if text is not None)
    assert used.keys() == {1.0, 2.0}
    assert min(used.values()) > 25
    dropped = batches(tmp_path / "2", {"a": {SQUARE: 2}}, caption_dropout_probability=1.0)
    assert dropped.batch(0, 0).texts == (None, None)
