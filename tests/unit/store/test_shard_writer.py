"""Shards are written on a thread, whole, in order, and noted once they are in the store."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kubetuner.data import shard_writer
from kubetuner.data.keys import Keys
from kubetuner.data.shard_writer import ShardWriter
from kubetuner.data.shards import ShardReader
from kubetuner.store import Store, open_store
from tests.servers.faults import FaultyProxy

ADDRESS = "gs://store-bucket/team/store"
KEYS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(7)]


def all_keys() -> Keys:
    return Keys((place, key, 0) for place, key in enumerate(KEYS))


def made(number: int) -> dict[str, Tensor]:
    return {"latents": torch.full((2, 3), float(number))}


def write(store: Store, keys: Keys, count: int, *, interrupted: bool = False) -> int:
    """Add the first ``count`` samples, three a shard."""
    with ShardWriter(store, "latents-x", keys, 3) as writer:
        for number, key in enumerate(KEYS[:count]):
            writer.add(key, made(number))
        if interrupted:
            raise KeyboardInterrupt
    return writer.added


def test_every_sample_is_in_a_shard_that_is_noted(tmp_path: Path) -> None:
    store, keys = Store(tmp_path), all_keys()
    assert write(store, keys, 7) == 7

    assert sorted(shard.samples for shard in keys.shards()) == [1, 3, 3]
    assert len(keys.missing()) == 0
    reader = ShardReader(store)
    for number, key in enumerate(KEYS):
        shard = keys.find(key)
        assert shard is not None
        assert torch.equal(reader.tensors(key, shard.file, ("latents",))["latents"], made(number)["latents"])
    assert {key: shard.file for key, shard in Store(tmp_path).known("latents-x").items()} == {
        key: shard.file for key in KEYS if (shard := keys.find(key)) is not None
    }


def test_large_samples_make_shards_of_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "MAX_SHARD_BYTES", 2 * made(0)["latents"].nbytes)
    keys = all_keys()
    write(Store(tmp_path), keys, 7)

    assert sorted(shard.samples for shard in keys.shards()) == [1, 2, 2, 2]


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_samples_are_taken_while_a_shard_is_on_its_way(proxy: FaultyProxy) -> None:
    upload = proxy.fail("POST .*uploadType", "hold")
    keys = all_keys()
    with ShardWriter(open_store(ADDRESS), "latents-x", keys, 3) as writer:
        for number, key in enumerate(KEYS[:5]):
            writer.add(key, made(number))  # Would wait for half a minute, and then a shard would be noted.
        assert not keys.shards()
        upload.released.set()

    assert [shard.samples for shard in keys.shards()].count(3) == 1
    assert set(open_store(ADDRESS).known("latents-x")) == set(KEYS[:5])


def test_what_stops_the_encoding_leaves_whole_shards_alone(tmp_path: Path) -> None:
    keys = all_keys()
    with pytest.raises(KeyboardInterrupt):
        write(Store(tmp_path), keys, 5, interrupted=True)

    assert set(Store(tmp_path).known("latents-x")) == set(KEYS[:3])


@pytest.mark.parametrize("count", [2, 7])
def test_a_store_that_cannot_be_written_stops_the_encoding(tmp_path: Path, count: int) -> None:
    (tmp_path / "file").write_text("no folder")
    keys = all_keys()
    with pytest.raises(OSError, match="file"):
        write(Store(tmp_path / "file"), keys, count)

    assert len(keys.missing()) == len(KEYS)
