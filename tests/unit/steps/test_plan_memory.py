"""The plan page's prediction of GPU memory, and the settings it offers."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from kubetuner.config.sections.steps import ModelRef
from kubetuner.errors import InputError
from kubetuner.steps.plan import Plan, make_plan
from kubetuner.steps.planning.memory import CARD, GIB, smallest_card

CONFIG = {"model_type": "full", "train_batch_size": 4, "max_train_steps": 10, "gradient_checkpointing": False}


@pytest.fixture
def plan(bases: dict[str, ModelRef], tmp_path: Path):
    """Makes the plan of a run over square and wide pictures."""
    folder = tmp_path / "a"
    folder.mkdir()
    for index, size in enumerate([(256, 256)] * 4 + [(512, 256)] * 4):
        Image.new("RGB", size).save(folder / f"{index}.png")

    def make(family: str = "sana", **settings: object) -> Plan:
        base = {"model_family": family, "pretrained_model_name_or_path": bases[family].path}
        data = [{"id": "a", "instance_data_dir": "a", "resolution": 256, "resolution_type": "pixel"}]
        return make_plan({**CONFIG, **base, **settings}, data, cwd=tmp_path, predict_memory=True)

    return make


def peak(one: Plan) -> int:
    found = one.summary["peak_memory_bytes"]
    assert isinstance(found, int)
    return found


@pytest.mark.parametrize("family", ["pixart_sigma", "sdxl", "sana"])
def test_the_largest_bucket_is_predicted(plan, family: str) -> None:
    one = plan(family)
    assert "for a batch of 4 of 512x256, captions of" in one.markdown
    assert "It fits a GPU of 8 GiB" in one.markdown
    assert "activations come on top" not in one.markdown
    assert peak(one) > peak(plan(family, train_batch_size=2))
    assert peak(one) > peak(plan(family, gradient_checkpointing=True))


def test_the_autoencoder_of_latents_made_while_training_counts(plan, monkeypatch) -> None:
    monkeypatch.setenv("KUBETUNER_STORE", "store")
    ahead = plan()
    for settings in ({"vae_cache_disable": True}, {"vae_cache_ondemand": True}):
        four, one = plan(**settings), plan(**settings, vae_batch_size=1)
        assert peak(four) > peak(one) > peak(ahead)
        assert "the VAE's weights 0.0 GiB, the VAE's activations 0.0 GiB" in four.markdown  # The tiny one's.
    assert "VAE" not in ahead.markdown


def test_it_is_compared_with_the_gpu(plan, monkeypatch) -> None:
    size = peak(plan())
    monkeypatch.setenv(CARD, str(2 * size / GIB))
    one = plan()
    assert "It fits the GPU of" in one.markdown
    assert "Settings that take less" not in one.markdown
    assert one.summary == plan().summary


def test_settings_that_fit_are_shown_and_not_made(plan, monkeypatch) -> None:
    size, checkpointed = peak(plan()), peak(plan(gradient_checkpointing=True))
    before = plan().sections
    monkeypatch.setenv(CARD, str((size + checkpointed) / 2 / 0.9 / GIB))
    one = plan()
    assert "It **does not fit** the GPU of" in one.markdown
    rows = [line for line in one.markdown.splitlines() if line.startswith("| `")]
    offered = {row.split("`")[1]: row.rsplit("|", 2)[1].strip() for row in rows}
    assert offered['"gradient_checkpointing": true'] == "yes"
    assert '"train_batch_size": 2, "gradient_accumulation_steps": 2' in offered
    assert one.sections == before
    for text, fits in offered.items():
        changed = plan(**json.loads("{" + text + "}"))
        assert (peak(changed) <= 0.9 * (size + checkpointed) / 2 / 0.9) == (fits == "yes"), text


def test_several_changes_together_where_one_is_not_enough(plan, monkeypatch) -> None:
    settings = {"mixed_precision": "no"}
    small = peak(plan(gradient_checkpointing=True, train_batch_size=1, gradient_accumulation_steps=4))
    least = min(peak(plan(**settings, gradient_checkpointing=True)), peak(plan(**settings, train_batch_size=1)))
    assert small < least
    monkeypatch.setenv(CARD, str((small + least) / 2 / 0.9 / GIB))
    rows = [line for line in plan(**settings).markdown.splitlines() if line.startswith("| `")]
    assert [row.endswith("| yes |") for row in rows] == [False] * (len(rows) - 1) + [True]
    assert '"gradient_checkpointing": true, "mixed_precision": "bf16"' in rows[-1]


def test_nothing_fits_a_tiny_gpu(plan, monkeypatch) -> None:
    monkeypatch.setenv(CARD, "0.001")
    markdown = plan(use_ema=True, ema_device="accelerator").markdown
    assert '`"ema_device": "cpu"`' in markdown
    assert "Nothing tried here fits" in markdown
    lora = plan(model_type="lora", lora_rank=4).markdown
    assert '"base_model_precision": "nf4-bnb"' in lora


@pytest.mark.parametrize("text", ["a lot", "0", "-8", "nan", "inf"])
def test_the_memory_must_be_a_number(plan, monkeypatch, text: str) -> None:
    monkeypatch.setenv(CARD, text)
    with pytest.raises(InputError, match=f"{CARD} is '{text}'; expected the GPU's memory in GiB"):
        plan()


def test_why_nothing_is_predicted(plan, bases, tmp_path, monkeypatch) -> None:
    shown = plan(pretrained_model_name_or_path="nobody/has-this").markdown
    assert "Not predicted: transformer/config.json of nobody/has-this cannot be read" in shown
    assert "activations come on top" in shown
    find = importlib.util.find_spec
    hidden = "kubetuner.steps.planning.memory.find_spec"
    monkeypatch.setattr(hidden, lambda name: None if name == "torch" else find(name))
    one = plan()
    assert "Not predicted: torch is not installed here; kubetuner[train] has it." in one.markdown
    assert one.summary["peak_memory_bytes"] is None


def test_usual_cards() -> None:
    assert [smallest_card(int(size * GIB)) for size in (1, 21, 22, 70, 72.5, 300)] == [8, 24, 32, 80, 96, 0]
