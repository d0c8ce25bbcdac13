from pathlib import Path

import pytest
import torch

from kubetuner.artifacts import ShardEntry
from kubetuner.data.shards import ShardReader
from kubetuner.errors import ArtifactError
from kubetuner.store import Store

NAMES = ("embeds", "mask")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def shards(store: Store) -> list[ShardEntry]:
    """Three shards of two samples each."""
    return [
        store.write_shard(
            "space", {f"k{number}": _sample(number) for number in (2 * shard, 2 * shard + 1)}
        )
        for shard in range(3)
    ]  # fmt: skip


def test_samples_are_read_in_any_order_in_their_dtype(store: Store, shards: list[ShardEntry]) -> None:
    reader = ShardReader(store)
    reader.verify(shards)
    for number in (5, 0, 3, 3, 1, 4, 2):
        read = reader.tensors(f"k{number}", shards[number // 2].file, NAMES)
        assert read.keys() == set(NAMES)
        assert read["embeds"].dtype == torch.bfloat16
        assert read["mask"].dtype == torch.int64
        assert all(torch.equal(read[name], _sample(number)[name]) for name in NAMES)
    assert reader.tensors("k0", shards[0].file, ("mask",)).keys() == {"mask"}


def test_what_is_read_may_be_changed(store: Store, shards: list[ShardEntry]) -> None:
    reader = ShardReader(store)
    reader.tensors("k0", shards[0].file, NAMES)["mask"].zero_()

    assert torch.equal(reader.tensors("k0", shards[0].file, NAMES)["mask"], _sample(0)["mask"])
    store.verify(shards[0])


def test_an_open_shard_outlives_its_file(store: Store, shards: list[ShardEntry]) -> None:
    reader = ShardReader(store)
    reader.tensors("k0", shards[0].file, NAMES)
    store.path(shards[0].file).unlink()

    assert torch.equal(reader.tensors("k1", shards[0].file, NAMES)["mask"], _sample(1)["mask"])


def test_verify_names_the_damaged_shard(store: Store, shards: list[ShardEntry]) -> None:
    path = store.path(shards[1].file)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")

    with pytest.raises(ArtifactError, match=shards[1].file):
        ShardReader(store).verify(shards)


def test_a_missing_shard_is_named(store: Store, shards: list[ShardEntry]) -> None:
    store.path(shards[0].file).unlink()

    with pytest.raises(ArtifactError, match=f"{shards[0].file} is missing; run the step"):
        ShardReader(store).tensors("k0", shards[0].file, NAMES)


@pytest.mark.parametrize("length", [0, 7, 60, -1])
def test_a_truncated_shard_is_named(store: Store, shards: list[ShardEntry], length: int) -> None:
    path = store.path(shards[0].file)
    path.write_bytes(path.read_bytes()[:length])

    with pytest.raises(ArtifactError, match=f"{shards[0].file} is damaged .*; run the step"):
        ShardReader(store).tensors("k0", shards[0].file, NAMES)


@pytest.mark.parametrize(("key", "names"), [("k4", NAMES), ("k0", ("pooled",))])
def test_a_sample_that_is_not_there_is_named(
    store: Store, shards: list[ShardEntry], key: str, names: tuple[str, ...]
) -> None:
    with pytest.raises(ArtifactError, match=f"{shards[0].file} holds no sample {key} .*run the caches again"):
        ShardReader(store).tensors(key, shards[0].file, names)


def _sample(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "embeds": torch.randn(3, 4, generator=generator).bfloat16(),
        "mask": torch.randint(0, 9, (5,), generator=generator),
    }
