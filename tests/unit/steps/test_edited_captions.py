"""Filtered and shuffled captions, from the files to what training draws."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kubetuner.artifacts import CaptionRow, TextRow, read_rows
from kubetuner.data.shards import ShardReader
from kubetuner.steps.cache_text_embeds import cache_text_embeds
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan
from kubetuner.store import Store
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

CONFIG: dict[str, Any] = {
    "model_type": "full", "model_family": "sana", "train_batch_size": 1, "max_train_steps": 2,
    "pretrained_model_name_or_path": "base",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_pipeline(build_pipeline("sana", "unit"), root / "base")
    for name in ("a", "b"):
        (root / name).mkdir()
        Image.new("RGB", (64, 64)).save(root / name / "x.png")
    (root / "a" / "x.txt").write_text("arafed dog, park, sun\narafed cat", encoding="utf-8")
    (root / "b" / "x.txt").write_text("arafed dog, park, sun", encoding="utf-8")
    return root


def entries(filters: list[str], shuffle: dict[str, Any] | None) -> list[dict[str, Any]]:
    common = {"caption_strategy": "textfile", "resolution": 64, "text_embeds": "plain"}
    return [
        {**common, "id": "a", "instance_data_dir": "a", "text_embeds": "t", "caption_shuffle": shuffle},
        {**common, "id": "b", "instance_data_dir": "b"},
        {"id": "plain", "dataset_type": "text_embeds", "default": True},
        {"id": "t", "dataset_type": "text_embeds", "caption_filter_list": filters},
    ]


def test_edits_decide_the_texts_and_their_embeddings_are_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "store"))
    plain = make_plan(CONFIG, entries([], None), cwd=root).sections
    dataset = tmp_path / "dataset"
    download_dataset(plain.download, dataset)
    first = cache_text_embeds(plain.cache_text_embeds, dataset, tmp_path / "1")
    assert (first.encoded, first.reused) == (3, 0)  # the empty text and two captions

    edited = make_plan(CONFIG, entries(["arafed "], {"enable": True, "count": 9}), cwd=root)
    assert edited.sections.download == plain.download
    sizes = [plan.summary["text_embeds_bytes"] for plan in (edited, make_plan(CONFIG, entries([], None), cwd=root))]
    assert sizes[0] * 3 == sizes[1] * 12  # with the empty text: 10 + 1 + 1 instead of 3
    second = cache_text_embeds(edited.sections.cache_text_embeds, dataset, tmp_path / "2")
    captions = {row.sample: set(row.texts) for row in read_rows(tmp_path / "2", "captions.jsonl", CaptionRow)}
    assert captions["b/x.png"] == {"arafed dog, park, sun"}
    assert {"dog, park, sun", "cat"} <= captions["a/x.png"]
    assert len(captions["a/x.png"]) > 3
    assert not any("arafed" in text for text in captions["a/x.png"])
    assert (second.encoded, second.reused) == (len(captions["a/x.png"]), 2)
    assert second.fingerprint != first.fingerprint

    reader = ShardReader(Store(tmp_path / "store"))
    rows = {row.text: row for row in read_rows(tmp_path / "2", "texts.jsonl", TextRow)}
    name = next(iter(second.tensors))
    one, other = (reader.tensors(rows[text].key, rows[text].shard, [name])[name] for text in ("cat", "dog, park, sun"))
    assert one.shape != other.shape or not torch.equal(one, other)
