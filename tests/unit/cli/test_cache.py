"""``kubetuner cache`` as a person calls it."""

import os
import time
from pathlib import Path

import pytest
import torch

from kubetuner.cli import main as module
from kubetuner.store import Store


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        module.main(["cache", *arguments])
    return int(caught.value.code or 0)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two shards, found through the environment."""
    made = Store(tmp_path / "store")
    made.write_shard("latents-a", {"k": {"latents": torch.zeros(1000)}})
    made.write_shard("text-b", {"k": {"embeds": torch.zeros(10)}, "m": {"embeds": torch.ones(10)}})
    monkeypatch.setenv("KUBETUNER_STORE", made.place)
    return made


def test_ls(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("ls") == 0
    head, latents, text, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["namespace", "shards", "samples", "bytes", "last", "used"]
    assert latents.split() == ["latents-a", "1", "1", "4.1", "kB", "0", "hours", "ago"]
    assert text.split()[:3] == ["text-b", "1", "2"]
    assert total.split()[:3] == ["all", "2", "3"]


def test_verify_names_the_damaged_shard(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify") == 0
    assert "2 shards are whole" in capsys.readouterr().out
    (entry,) = store.entries("text-b")
    shard = store.path(entry.shard)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert call("verify") == 1
    shown = capsys.readouterr().err
    assert f"damaged: {shard} (2 samples)" in shown
    assert "1 of 2 shards" in shown


def test_gc(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for entry in store.entries():
        os.utime(Path(store.place) / entry.name, (time.time() - 20 * 86400,) * 2)
    arguments = ("gc", "--unused-days", "14")
    assert call(*arguments, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert shown.count("not used for 20 days") == 2
    assert "would remove 2 files, 4.3 kB" in shown
    assert len(store.entries()) == 2
    assert call(*arguments) == 0
    assert "removed 2 files" in capsys.readouterr().out
    assert store.entries() == []


def test_a_store_must_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBETUNER_STORE", raising=False)
    assert call("ls") == 2
    assert "--store is missing" in capsys.readouterr().err
    assert call("ls", "--store", str(tmp_path / "nowhere")) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert call("ls", "--store", "s3://bucket/x") == 2
    assert "a store is a folder or gs://bucket/prefix" in capsys.readouterr().err
