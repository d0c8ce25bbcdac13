"""The demo's committed bases, judge and pictures are what its README and recipes say."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline
from torch import nn
from transformers import CLIPModel, CLIPProcessor

from pipelines.recipes.demo import models, shapes
from pipelines.recipes.demo.make_bases import DENOISERS
from pipelines.recipes.demo.scoring import score_picture, score_pictures
from pipelines.recipes.demo.train_autoencoder import pixels
from pipelines.recipes.demo.train_denoiser import denoiser_of, draw, examples_of, loss_of
from pipelines.recipes.demo.train_judge import found_share, matches

# numpy's wish about an attribute of torch tensors, met inside diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DEMO = Path(models.__file__).parent
MEGABYTE = 1_000_000


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _load(family: str) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(DEMO / "bases" / family, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _networks(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_base_draws_old_shapes_and_no_ring(family: str) -> None:
    pipeline = _load(family)
    old = [picture.caption for picture in shapes.old_pictures()[::8]]
    rings = [picture.caption for picture in shapes.ring_pictures()[::2]]

    images = draw(pipeline, family, old + rings, DENOISERS[family])

    assert {image.size for image in images} == {(64, 64)}
    assert score_pictures(images[: len(old)], old).exact >= 0.75
    assert score_pictures(images[len(old) :], rings).shape <= 0.25


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_base_loads_as_float32_from_half_precision_files(family: str) -> None:
    stored = list((DEMO / "bases" / family).rglob("*.safetensors"))

    assert stored
    assert {network.dtype for network in _networks(_load(family)).values()} == {torch.float32}


@pytest.mark.parametrize(("family", "most"), [("pixart_sigma", 3.5), ("sdxl", 4.5), ("sana", 2.8)])
def test_bases_are_small(family: str, most: float) -> None:
    assert _size(DEMO / "bases" / family) < most * MEGABYTE


def test_pictures_and_judge_are_small() -> None:
    assert _size(DEMO / "data") < 0.12 * MEGABYTE
    assert _size(DEMO / "judge") < 0.6 * MEGABYTE


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_autoencoder_can_show_a_ring(family: str) -> None:
    vae = _load(family).vae
    pictures = shapes.ring_eval_pictures()
    images = pixels([picture.draw() for picture in pictures])

    with torch.no_grad():
        encoded = vae.encode(images)
        latents = encoded.latent if family == "sana" else encoded.latent_dist.sample()
        decoded = vae.decode(latents).sample

    assert (decoded - images).square().mean().item() < 0.01
    assert 0.8 < latents.std().item() * vae.config.scaling_factor < 1.25


def test_judge_ranks_the_right_caption_first() -> None:
    model = CLIPModel.from_pretrained(DEMO / "judge", local_files_only=True)
    processor = CLIPProcessor.from_pretrained(DEMO / "judge", local_files_only=True)
    held_out = shapes.ring_eval_pictures()
    captions = [picture.caption for picture in shapes.ring_pictures()]

    best = matches(model, processor, [picture.draw() for picture in held_out], captions).argmax(1)

    assert [captions[row] for row in best] == [picture.caption for picture in held_out]
    assert found_share(model, processor, shapes.old_pictures()) >= 0.95


@pytest.mark.parametrize("family", models.FAMILIES)
def test_unit_pipelines_repeat_for_a_seed(family: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (models.build_pipeline(family, "unit", seed) for seed in (1, 1, 2))
    weights = [nn.utils.parameters_to_vector(denoiser_of(p).parameters()) for p in (first, again, other)]

    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state), "building leaves the caller's random state alone"


@pytest.mark.parametrize("family", models.FAMILIES)
def test_unit_pipelines_are_tiny_and_draw_any_multiple_of_64(family: str) -> None:
    pipeline = models.build_pipeline(family, "unit")
    options = {} if family == "sdxl" else {"use_resolution_binning": False, "clean_caption": False}
    if family == "sana":
        options["complex_human_instruction"] = None

    image = pipeline("a red circle", height=64, width=128, num_inference_steps=2, **options).images[0]

    assert image.size == (128, 64)
    assert sum(parameter.numel() for part in _networks(pipeline).values() for parameter in part.parameters()) < 400_000


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_weight_of_a_unit_denoiser_gets_a_gradient(family: str) -> None:
    pipeline = models.build_pipeline(family, "unit")
    examples = examples_of(pipeline, family, shapes.old_pictures()[:4])
    model = denoiser_of(pipeline)
    torch.manual_seed(0)

    loss_of(pipeline, family, None)(model, examples.latents, {k: v[:4] for k, v in examples.text.items()}).backward()

    still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == []


def test_a_written_pipeline_loads_with_the_same_weights(tmp_path: Path) -> None:
    pipeline = models.build_pipeline("sdxl", "unit")
    models.write_pipeline(pipeline, tmp_path)

    loaded = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)

    for name, network in _networks(pipeline).items():
        for key, weight in getattr(loaded, name).state_dict().items():
            assert torch.equal(weight, network.state_dict()[key]), f"{name}.{key}"


@pytest.mark.parametrize(
    ("folder", "pictures"),
    [
        ("ring", shapes.ring_pictures()),
        ("shapes", shapes.old_pictures()),
        ("ring-eval", shapes.ring_eval_pictures()),
    ],
)
def test_committed_pictures_are_what_the_code_draws(folder: str, pictures: list[shapes.Picture]) -> None:
    assert {path.name for path in (DEMO / "data" / folder).iterdir()} == {p.file_name for p in pictures}
    for picture in pictures:
        with Image.open(DEMO / "data" / folder / picture.file_name) as image:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), np.asarray(picture.draw()))


def test_held_out_rings_are_not_the_training_rings() -> None:
    trained = {picture.draw().tobytes() for picture in shapes.ring_pictures()}

    assert trained.isdisjoint(picture.draw().tobytes() for picture in shapes.ring_eval_pictures())


@pytest.mark.parametrize("picture", shapes.ring_eval_pictures(), ids=lambda picture: picture.colour)
def test_a_moved_ring_still_scores_as_its_caption(picture: shapes.Picture) -> None:
    assert score_picture(picture.draw(), picture.caption).exact


def test_score_tells_colour_from_shape() -> None:
    drawn = shapes.Picture("red", "circle", "white").draw()

    assert score_picture(drawn, "a red star on a white background").colour
    assert not score_picture(drawn, "a red star on a white background").shape
    assert score_picture(drawn, "a blue circle on a black background").shape
    assert not score_picture(drawn, "a blue circle on a black background").exact


@pytest.mark.parametrize(
    "caption", ["", "a red circle", "a mauve circle on a white background", "a orange ring on a white background"]
)
def test_a_caption_outside_the_vocabulary_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="not a caption of the demo"):
        shapes.parse_caption(caption)


def test_captions_are_spelled_in_whole_words() -> None:
    caption = "an orange ring on a black background"
    for family in models.FAMILIES:
        tokenizer = models.build_pipeline(family, "unit").tokenizer
        words = len(caption.split())
        assert len(tokenizer(caption).input_ids) - len(tokenizer("").input_ids) == words, family
