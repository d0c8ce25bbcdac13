import logging
import os
import time
from pathlib import Path

import pytest
import torch

from kubetuner.artifacts import LatentsArtifact, ShardEntry, write_artifact
from kubetuner.errors import ArtifactError, InputError
from kubetuner.store import Store
from kubetuner.storekeeping import DAY, Garbage, damaged, find_garbage, namespaces, remove, used_by_artifacts


def fill(store: Store, name: str, namespace: str = "latents-a", samples: int = 2) -> ShardEntry:
    keys = [f"{name}{index:x}" for index in range(samples)]
    return store.write_shard(namespace, {key: {"latents": torch.full((4,), float(len(name)))} for key in keys})


def unused_for(store: Store, shard: ShardEntry, days: float) -> None:
    then = time.time() - days * DAY
    for entry in store.entries():
        if entry.shard == shard.file:
            os.utime(Path(store.place) / entry.name, (then, then))


def rot(path: Path) -> None:
    """Change a byte as a failing disk does: size and date stay."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def garbage(store: Store, kept: set[str] | None = None, days: float = 14.0, later: float = 0.0) -> list[Garbage]:
    """What is garbage ``later`` days from now."""
    return find_garbage(store, kept or set(), days, time.time() + later * DAY)


def test_namespaces_are_counted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new, text = fill(store, "a"), fill(store, "bb", samples=3), fill(store, "c", "text-a")
    unused_for(store, old, 30)
    unused_for(store, new, 3)

    latents, texts = namespaces(store, time.time())

    assert (latents.name, latents.shards, latents.samples) == ("latents-a", 2, 5)
    assert latents.bytes == old.bytes + new.bytes
    assert latents.unused_seconds == pytest.approx(3 * DAY, abs=60)
    assert (texts.name, texts.bytes, round(texts.unused_seconds / 60)) == ("text-a", text.bytes, 0)


def test_rot_is_found_by_verify_and_encoded_again(tmp_path: Path) -> None:
    fill(Store(tmp_path), "a")
    bad = fill(Store(tmp_path), "bb")
    rot(tmp_path / "shards" / bad.file)
    assert set(Store(tmp_path).known("latents-a")) == {"a0", "a1", "bb0", "bb1"}  # Its date is as it was.

    assert list(damaged(Store(tmp_path))) == [(str(tmp_path / "shards" / bad.file), 2)]

    assert set(Store(tmp_path).known("latents-a")) == {"a0", "a1"}
    assert list(damaged(Store(tmp_path))) == []


def test_rot_is_found_when_the_shard_is_read(tmp_path: Path) -> None:
    from kubetuner.data.shards import ShardReader

    bad = fill(Store(tmp_path), "a")
    rot(tmp_path / "shards" / bad.file)
    reader = ShardReader(Store(tmp_path))
    reader.verify([bad])
    with pytest.raises(ArtifactError, match=bad.file):
        reader.tensors("a0", bad.file, ["latents"])
    assert Store(tmp_path).known("latents-a") == {}


@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
def test_a_file_that_looks_different_is_hashed_at_the_start(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = fill(Store(tmp_path), "a"), fill(Store(tmp_path), "bb")
    path = tmp_path / "shards" / bad.file
    content = path.read_bytes()
    if change == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if change == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=bad.file):
        Store(tmp_path).verify(bad)
    with caplog.at_level(logging.WARNING):
        assert set(Store(tmp_path).known("latents-a").values()) == {good}
    assert change == "flip" or bad.file in caplog.text  # A reader that hashed it has forgotten it already.


def test_sound_shards_are_hashed_once_after_they_were_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kubetuner.store.folder as module

    shard = fill(Store(tmp_path), "a")
    hashed: list[Path] = []
    real = module.sha256_of
    monkeypatch.setattr(module, "sha256_of", lambda path: hashed.append(path) or real(path))
    assert Store(tmp_path).known("latents-a")
    assert hashed == []
    os.utime(tmp_path / "shards" / shard.file)
    assert Store(tmp_path).known("latents-a")
    assert Store(tmp_path).known("latents-a")
    assert len(hashed) == 1


def test_only_wanted_samples_are_looked_at_and_claimed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    used, other = fill(store, "a"), fill(store, "bb")
    unused_for(store, used, 20)
    unused_for(store, other, 20)
    (tmp_path / "shards" / other.file).write_bytes(b"damaged")

    assert Store(tmp_path).known("latents-a", {"a1", "c0"}) == {"a1": used}

    assert [one.file.file for one in garbage(store)] == [other.file]


def test_gc_spares_what_artifacts_and_runs_use(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    kept, old, recent = fill(store, "a"), fill(store, "bb"), fill(store, "ccc")
    for shard, days in ((kept, 100), (old, 15), (recent, 13)):
        unused_for(store, shard, days)
    artifact = LatentsArtifact(
        fingerprint="f", num_samples=2, encoded=2, reused=0, tensors={}, shards=(kept,), parents=("d",)
    )
    write_artifact_in(tmp_path / "runs" / "one" / "latents", artifact)

    found = garbage(store, used_by_artifacts([tmp_path / "runs"]))
    assert [one.file.file for one in found] == [old.file]
    assert remove(store, found, 14) == found

    assert set(store.known("latents-a")) == {"a0", "a1", "ccc0", "ccc1"}
    assert {path.name for path in (Path(store.place) / "shards").iterdir()} == {kept.file, recent.file}


def write_artifact_in(folder: Path, artifact: LatentsArtifact) -> None:
    folder.mkdir(parents=True)
    write_artifact(folder, artifact)


def test_what_a_run_claims_while_gc_works_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    shard = fill(store, "a")
    unused_for(store, shard, 20)
    found = garbage(store)
    Store(tmp_path).claim([shard])

    assert remove(store, found, 14) == []
    assert set(Store(tmp_path).known("latents-a")) == {"a0", "a1"}


def test_long_work_renews_its_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    shard = fill(store, "a")
    working = Store(tmp_path)
    working.known("latents-a")
    unused_for(store, shard, 20)
    working.renew_claims()
    assert garbage(store)  # The last time was just now.
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    working.renew_claims()
    assert garbage(store) == []


def test_leftovers_go_when_they_are_old(tmp_path: Path) -> None:
    store = Store(tmp_path)
    shard = fill(store, "a")
    leftovers = [
        tmp_path / "shards" / ".writing-0",
        tmp_path / "shards" / f"{'0' * 64}.safetensors",
        tmp_path / "index" / "latents-a" / f".{'0' * 64}.json.x.tmp",
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    assert garbage(store, days=3, later=2) == []
    found = garbage(store, kept={shard.file}, days=1, later=2)
    assert {tmp_path / one.file.name for one in found} == set(leftovers)
    remove(store, found, 1)
    assert not any(path.exists() for path in leftovers)
    assert store.path(shard.file).exists()


def test_gc_refuses_what_is_not_safe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--unused-days is 0\.5; expected 1 or more"):
        garbage(Store(tmp_path), days=0.5)
    with pytest.raises(InputError, match="there is no such folder"):
        used_by_artifacts([tmp_path / "nowhere"])
    (tmp_path / "artifact.json").write_text('{"kind": "of tomorrow"}')
    with pytest.raises(ArtifactError, match=r"artifact\.json was not written by this version"):
        used_by_artifacts([tmp_path])


def test_a_store_for_reading_only_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = fill(Store(tmp_path), "a")
    unused_for(Store(tmp_path), shard, 20)
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)  # As root sees no permissions, say so for it.
    reader = Store(tmp_path)
    reader.claim([shard])
    reader.verify(shard)
    assert garbage(Store(tmp_path))
