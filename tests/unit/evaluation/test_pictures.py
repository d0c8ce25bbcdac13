from pathlib import Path

import pytest
import torch
from PIL import Image

from kubetuner.config.sections.steps import EvaluateSection, Prompt
from kubetuner.evaluation.pictures import draw_shots, shots_of
from kubetuner.families import load_family

# numpy's wish about an attribute of torch tensors, met inside diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_every_prompt_resolution_and_seed_has_its_own_file(section: EvaluateSection) -> None:
    prompts = (
        Prompt(shortname="a b", prompt="x"),
        Prompt(shortname="a/b", prompt="y"),
        Prompt(shortname="☃", prompt=""),
    )
    many = section.model_copy(
        update={"prompts": prompts, "resolutions": ((64, 64), (128, 64)), "num_validation_images": 2}
    )
    shots = shots_of(many)

    assert len({shot.stem for shot in shots}) == len(shots) == 12
    assert [shot.seed for shot in shots[:2]] == [5, 6]
    assert shots[0].stem == "01_a-b_64x64_5"
    assert all(shot.stem.isascii() and "/" not in shot.stem for shot in shots)


def test_pictures_are_png_of_the_size_asked_for_and_repeat(section: EvaluateSection, tmp_path: Path) -> None:
    family = load_family("pixart_sigma")
    wide = section.model_copy(update={"resolutions": ((128, 64),)})
    pipeline = family.load_pipeline(wide.model, None, torch.device("cpu"))

    paths = draw_shots(family, pipeline, shots_of(wide), wide, tmp_path, "before")
    again = draw_shots(family, pipeline, shots_of(wide), wide, tmp_path, "after")

    assert paths[0] == "images/01_a-ring_128x64_5_before.png"
    for first, second in zip(paths, again, strict=True):
        with Image.open(tmp_path / first) as image:
            assert (image.format, image.size) == ("PNG", (128, 64))
        assert (tmp_path / first).read_bytes() == (tmp_path / second).read_bytes()


def test_each_prompt_size_and_seed_is_what_the_family_draws(section: EvaluateSection, tmp_path: Path) -> None:
    family = load_family("pixart_sigma")
    many = section.model_copy(update={"resolutions": ((64, 64), (128, 64)), "num_validation_images": 2})
    pipeline = family.load_pipeline(many.model, None, torch.device("cpu"))
    shots = shots_of(many)

    paths = draw_shots(family, pipeline, shots, many, tmp_path, "before")

    assert len({(tmp_path / path).read_bytes() for path in paths}) == len(shots) == 8
    for shot, path in list(zip(shots, paths, strict=True))[::3]:
        with torch.no_grad():
            drawn = family.draw(pipeline, shot.prompt, (shot.width, shot.height), shot.seed, many)
        with Image.open(tmp_path / path) as image:
            assert image.tobytes() == drawn.tobytes()
