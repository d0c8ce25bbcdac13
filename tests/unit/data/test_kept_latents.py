"""What training puts into the store is there for others in whole shards, and read back as it was."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kubetuner.artifacts import ShardEntry
from kubetuner.data import kept_latents
from kubetuner.data.kept_latents import KeptLatents
from kubetuner.data.keys import Keys
from kubetuner.errors import ArtifactError
from kubetuner.store import Store

KEYS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(6)]


def made(number: int) -> dict[str, Tensor]:
    return {"latents": torch.full((2, 3), float(number))}


Open = Callable[[], KeptLatents]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the store anew."""
    monkeypatch.setattr(kept_latents, "SAMPLES_PER_SHARD", 2)
    return lambda: KeptLatents(Store(tmp_path), "latents-x", ("latents",), KEYS)


def test_of_a_process_that_dies_only_an_unfinished_shard_is_lost(opened: Open) -> None:
    first = opened()
    for number in range(5):
        assert KEYS[number] not in first
        first.add(KEYS[number], made(number))
        assert torch.equal(first[KEYS[number]]["latents"], made(number)["latents"])

    after = opened()

    assert [key in after for key in KEYS] == [True] * 4 + [False] * 2
    assert torch.equal(after[KEYS[3]]["latents"], made(3)["latents"])
    first.write()
    assert KEYS[4] not in after
    after.look()
    assert torch.equal(after[KEYS[4]]["latents"], made(4)["latents"])


def test_two_that_write_the_same_agree(opened: Open) -> None:
    one, other = opened(), opened()
    for number in (0, 1, 1):
        one.add(KEYS[number], made(number))
    for number in (1, 2):
        other.add(KEYS[number], made(number))

    third = opened()

    assert [key in third for key in KEYS] == [True] * 3 + [False] * 3
    assert torch.equal(third[KEYS[1]]["latents"], made(1)["latents"])


def test_a_damaged_shard_is_forgotten_and_made_again(opened: Open, tmp_path: Path) -> None:
    first = opened()
    for number in range(2):
        first.add(KEYS[number], made(number))
    (path,) = (tmp_path / "shards").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"x")

    with pytest.raises(ArtifactError, match="is damaged"):
        first[KEYS[0]]
    after = opened()
    assert KEYS[0] not in after
    for number in range(2):
        after.add(KEYS[number], made(number))
    assert torch.equal(opened()[KEYS[0]]["latents"], made(0)["latents"])


def test_a_key_is_found_by_itself() -> None:
    keys = Keys((place, key, 0) for place, key in enumerate(KEYS[:4]))
    shard = ShardEntry(file="s", samples=2, bytes=1, sha256="s")
    keys.put(keys.numbers(KEYS[:2]), shard)

    assert [keys.find(key) for key in KEYS] == [shard, shard, None, None, None, None]
    assert set(keys.lacking(KEYS)) == set(keys.numbers(KEYS[2:4]))
    assert Keys([]).find(KEYS[0]) is None
