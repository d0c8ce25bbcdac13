import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from kubetuner.errors import TrainingError
from kubetuner.training.checkpoints import Checkpoints, LossPoint, Snapshot


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "key", limit=0)
    snapshot = _snapshot(3)

    checkpoints.save(snapshot)
    loaded = checkpoints.load("latest")

    assert loaded is not None
    assert loaded.step == 3
    assert loaded.points == snapshot.points
    assert torch.equal(loaded.weights["weight"], snapshot.weights["weight"])
    moments, expected = loaded.optimizer["state"][0], snapshot.optimizer["state"][0]
    assert all(torch.equal(moments[name], expected[name]) for name in expected)


@pytest.mark.parametrize("damage", ["truncate", "flip", "no manifest", "missing file"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    checkpoints = Checkpoints(tmp_path, "key", limit=0)
    checkpoints.save(_snapshot(3))
    newest = checkpoints.save(_snapshot(6))
    weights = newest / "weights.safetensors"
    match damage:
        case "truncate":
            weights.write_bytes(weights.read_bytes()[:-5])
        case "flip":
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
        case "no manifest":
            (newest / "manifest.json").unlink()
        case _:
            (newest / "optimizer.pt").unlink()

    with caplog.at_level(logging.WARNING):
        loaded = checkpoints.load("latest")

    assert loaded is not None
    assert loaded.step == 3
    assert "checkpoint-6" in caplog.text


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "key", limit=2)

    for step in (5, 10, 100):
        checkpoints.save(_snapshot(step))

    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_runs_do_not_see_each_others_checkpoints(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "one", limit=0).save(_snapshot(3))

    assert Checkpoints(tmp_path, "two", limit=0).load("latest") is None


def test_a_named_checkpoint_must_be_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "key", limit=0)
    checkpoints.save(_snapshot(3))

    assert checkpoints.load("") is None
    named = checkpoints.load("checkpoint-3")
    assert named is not None
    with pytest.raises(TrainingError, match=r"checkpoint-4.*checkpoint-3"):
        checkpoints.load("checkpoint-4")


def test_an_unfinished_folder_is_no_checkpoint_and_remove_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    checkpoints = Checkpoints(root, "key", limit=0)
    (root / "key/.checkpoint-9.tmp").mkdir(parents=True)

    assert checkpoints.load("latest") is None
    checkpoints.remove()
    assert not root.exists()


def _snapshot(step: int) -> Snapshot:
    torch.manual_seed(step)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    points = (LossPoint(step=1, loss=0.1, lr=1e-3), LossPoint(step=step, loss=1 / 3, lr=1e-3))
    return Snapshot(step, dict(layer.named_parameters()), optimizer.state_dict(), points)
