import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from kubetuner.digests import sha256_of
from kubetuner.errors import ArtifactError
from kubetuner.store import Store, resolve_store
from tests.unit.conftest import fork, wait

Samples = dict[str, dict[str, Tensor]]

_keys = st.text("0123456789abcdef", min_size=4, max_size=8)
_tensors = st.builds(
    lambda shape, dtype, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype),
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.integers(0, 1000),
)
_samples = st.dictionaries(
    _keys, st.dictionaries(st.sampled_from(["embeds", "latents", "pooled"]), _tensors, min_size=1), min_size=1
)


@given(samples=_samples, order=st.randoms())
@settings(max_examples=30)
def test_samples_come_back_and_their_order_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, samples: Samples, order: random.Random
) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    shuffled = dict(order.sample(list(samples.items()), len(samples)))

    shard = store.write_shard("space", samples)

    assert store.write_shard("space", shuffled) == shard
    assert store.known("space") == dict.fromkeys(samples, shard)
    stored = load_file(store.path(shard.file))
    assert stored.keys() == {f"{key}.{name}" for key in samples for name in samples[key]}
    for key, named in samples.items():
        for name, tensor in named.items():
            assert stored[f"{key}.{name}"].dtype == tensor.dtype
            assert torch.equal(stored[f"{key}.{name}"], tensor)


def test_a_shard_is_named_by_its_bytes(tmp_path: Path) -> None:
    store = Store(tmp_path)

    shards = [store.write_shard("space", _numbered(*numbers)) for numbers in [(1, 2), (3,), (1, 2)]]

    assert shards[0] == shards[2] != shards[1]
    assert _files(tmp_path, "shards") == {shard.file for shard in shards}
    for shard in shards:
        assert shard.file == f"{sha256_of(store.path(shard.file))}.safetensors"
        assert shard.bytes == store.path(shard.file).stat().st_size
    assert [shard.samples for shard in shards] == [2, 1, 2]


def test_a_store_that_was_never_written_knows_nothing(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").known("space") == {}
    assert not (tmp_path / "none").exists()


def test_namespaces_do_not_see_each_other(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_shard("a", _numbered(1))
    store.write_shard("b", _numbered(2))

    assert store.known("a").keys() == {"k1"}
    assert store.known("b").keys() == {"k2"}


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_flip_a_bit, "do not have the checksum"),
        (_truncate, r"it has \d+ bytes, expected \d+"),
        (Path.unlink, "is missing"),
    ],
)
def test_a_damaged_shard_is_named_and_only_its_samples_are_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], words: str
) -> None:
    store = Store(tmp_path)
    broken, whole = store.write_shard("space", _numbered(1, 2)), store.write_shard("space", _numbered(3))
    damage(store.path(broken.file))

    with pytest.raises(ArtifactError, match=words) as error:
        store.verify(broken)
    assert broken.file in str(error.value)
    assert "run cache_vae and cache_text_embeds again" in str(error.value)

    assert store.known("space") == {"k3": whole}
    assert broken.file in caplog.text
    assert "2 samples are encoded again" in caplog.text

    assert store.write_shard("space", _numbered(1, 2)) == broken
    store.verify(broken)
    assert store.known("space") == {"k1": broken, "k2": broken, "k3": whole}


@pytest.mark.parametrize("content", [b"", b"{", b'{"shard": 1}', b"\xff\xfe"])
def test_a_damaged_index_entry_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    store = Store(tmp_path)
    store.write_shard("space", _numbered(1))
    (entry,) = (tmp_path / "index" / "space").iterdir()
    entry.write_bytes(content)

    assert store.known("space") == {}
    assert entry.name in caplog.text
    store.write_shard("space", _numbered(1))
    assert store.known("space").keys() == {"k1"}


def test_a_sample_of_a_damaged_shard_is_found_in_another(tmp_path: Path) -> None:
    store = Store(tmp_path)
    shards = [store.write_shard("space", _numbered(1, other)) for other in (2, 3)]
    for index, broken in enumerate(shards):
        kept = shards[1 - index]
        data = store.path(broken.file).read_bytes()
        store.path(broken.file).unlink()
        assert store.known("space")["k1"] == kept
        store.path(broken.file).write_bytes(data)
        store.write_shard("space", _numbered(1, 2 + index))


def test_shapes_tell_which_axes_vary(tmp_path: Path) -> None:
    store = Store(tmp_path)
    short = store.write_shard("space", {"a": {"embeds": torch.ones(3, 8, dtype=torch.bfloat16), "id": torch.ones(())}})
    long = store.write_shard("space", {"b": {"embeds": torch.ones(5, 8, dtype=torch.bfloat16), "id": torch.ones(())}})

    assert store.shapes([short]) == {"embeds": (3, 8), "id": ()}
    assert store.shapes([short, long]) == {"embeds": (None, 8), "id": ()}
    assert store.shapes([]) == {}


@pytest.mark.parametrize("rename", [1, 2])
def test_a_writer_killed_before_any_rename_leaves_nothing_visible(
    tmp_path: Path, rename: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "store")

    def write() -> None:
        count, replace = 0, os.replace

        def replace_or_die(path: str, target: str) -> None:
            nonlocal count
            count += 1
            if count == rename:
                os._exit(9)
            replace(path, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", replace_or_die)
            store.write_shard("space", _numbered(1, 2))

    assert wait(fork(write)) == 9
    assert store.known("space") == {}
    assert not caplog.messages  # The index never names a shard that is not there.

    store.write_shard("space", _numbered(1, 2))

    whole = Store(tmp_path / "whole")
    whole.write_shard("space", _numbered(1, 2))
    assert _visible(tmp_path / "store") == _visible(tmp_path / "whole")


def test_a_store_survives_kills_at_any_moment(tmp_path: Path) -> None:
    groups = [tuple(range(start, start + 3)) for start in range(0, 60, 3)]

    def complete(store: Store) -> None:
        known = store.known("space")
        for group in groups:
            if not all(f"k{number}" in known for number in group):
                store.write_shard("space", _numbered(*group))

    whole, killed = Store(tmp_path / "whole"), Store(tmp_path / "killed")
    started = time.monotonic()
    complete(whole)
    duration = time.monotonic() - started
    chance = random.Random(0)
    for _ in range(6):
        child = fork(lambda: complete(killed))
        time.sleep(chance.uniform(0, duration / 3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for key, shard in killed.known("space").items():
            assert torch.equal(load_file(killed.path(shard.file))[f"{key}.x"], _numbered(int(key[1:]))[key]["x"])

    complete(killed)

    assert _visible(tmp_path / "killed") == _visible(tmp_path / "whole")


def test_two_processes_may_write_one_store_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def write(sizes: int) -> None:
        for start in range(0, 24, sizes):
            store.write_shard("space", _numbered(*range(start, start + sizes)))
            assert store.known("space").keys() >= {f"k{number}" for number in range(start + sizes)}

    children = [fork(lambda: write(2)), fork(lambda: write(2)), fork(lambda: write(3))]

    assert [wait(child) for child in children] == [0, 0, 0]
    known = store.known("space")
    assert known.keys() == {f"k{number}" for number in range(24)}
    for key, shard in known.items():
        assert torch.equal(load_file(store.path(shard.file))[f"{key}.x"], _numbered(int(key[1:]))[key]["x"])
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert len(_files(tmp_path, "shards")) == 12 + 8


def test_two_processes_may_find_the_same_damage_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(40):
        store.path(store.write_shard("space", _numbered(number)).file).unlink()

    children = [fork(lambda: _expect_nothing(store)) for _ in range(3)]

    assert [wait(child) for child in children] == [0, 0, 0]


def test_the_environment_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBETUNER_STORE", raising=False)
    assert resolve_store(tmp_path / "artifact").place == str(tmp_path / "artifact")
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "shared"))
    assert resolve_store(tmp_path / "artifact").place == str(tmp_path / "shared")


def _expect_nothing(store: Store) -> None:
    assert store.known("space") == {}


def _numbered(*numbers: int) -> Samples:
    return {f"k{number}": {"x": torch.randn(64, generator=torch.Generator().manual_seed(number))} for number in numbers}


def _files(root: Path, folder: str) -> set[str]:
    return {path.name for path in (root / folder).iterdir()}


def _visible(root: Path) -> dict[str, bytes]:
    """The finished files of a store."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
