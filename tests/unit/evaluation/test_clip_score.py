from pathlib import Path

import pytest
import torch

from kubetuner.evaluation.clip_score import Judge, Pair, ScoreTable, bar_of, verdict
from pipelines.recipes.demo import models, shapes

JUDGE = Path(models.__file__).parent / "judge"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(str(JUDGE), CPU)


def test_right_captions_score_high_and_wrong_ones_low(judge: Judge, tmp_path: Path) -> None:
    pictures = shapes.ring_pictures()[::4]
    paths = [tmp_path / picture.file_name for picture in pictures]
    for picture, path in zip(pictures, paths, strict=True):
        picture.draw().save(path)
    captions = [picture.caption for picture in pictures]

    table = judge.score(paths, [*captions, captions[0]])

    assert table.prompts == tuple(captions), "each prompt once"
    assert all(0 <= score <= 100 for row in table.scores for score in row)
    for index, caption in enumerate(captions):
        assert table.of(index, caption) > 70
        assert table.of(index, caption) == max(table.scores[index])


def test_scores_equal_the_models_own_cosine(judge: Judge, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    picture = shapes.ring_pictures()[0]
    picture.draw().save(tmp_path / "a.png")
    model = CLIPModel.from_pretrained(JUDGE)
    inputs = CLIPProcessor.from_pretrained(JUDGE)(text=[picture.caption], images=[picture.draw()], return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds).item()

    assert judge.score([tmp_path / "a.png"], [picture.caption]).scores[0][0] == pytest.approx(100 * cosine, abs=1e-3)


def test_a_prompt_longer_than_the_judge_reads_is_named(judge: Judge, tmp_path: Path) -> None:
    shapes.ring_pictures()[0].draw().save(tmp_path / "a.png")
    long = "a red ring " * 60

    table = judge.score([tmp_path / "a.png"], [long, "a red ring"])

    assert table.truncated == (long,)


def test_the_bar_lies_between_foreign_and_own_scores() -> None:
    table = ScoreTable(("ring", "star"), ((20.0, 10.0), (12.0, 80.0), (90.0, 10.0), (8.0, 82.0)), ())
    bar = bar_of(table, ["ring", "star", "ring", "star"])

    assert bar == 50.0
    assert verdict(Pair(20, 90), bar) == "Could not draw it before, can now"
    assert verdict(Pair(80, 82), bar) == "Could draw it before, still can"
    assert verdict(Pair(80, 20), bar) == "Could draw it before, cannot now"
    assert verdict(Pair(20, 30), bar) == "Could not draw it before, nor now"


def test_without_contrast_or_other_prompts_there_is_no_bar_and_only_change_is_told() -> None:
    assert bar_of(ScoreTable(("ring",), ((20.0,), (90.0,)), ()), ["ring", "ring"]) is None
    assert bar_of(ScoreTable(("a", "b"), ((20.0, 19.0), (18.0, 20.0)), ()), ["a", "b"]) is None
    assert verdict(Pair(20, 90), None) == "Closer to its prompt"
    assert verdict(Pair(20, 10), None) == "Further from its prompt"
    assert verdict(Pair(20, 21), None) == "No clear change"
