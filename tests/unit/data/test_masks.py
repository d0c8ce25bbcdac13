"""Masks: pairing, what decoding shows, and the weights by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from kubetuner.config.sections.geometry import Geometry
from kubetuner.data.geometry import Placement, place
from kubetuner.data.masks import check_mask, misfit, pair, to_weights
from kubetuner.data.pictures import PictureError, to_pixels
from kubetuner.errors import DatasetError
from kubetuner.sources.base import Item


def png(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def grey(values: object) -> Image.Image:
    return Image.fromarray(np.array(values, dtype=np.uint8))


def whole(width: int, height: int) -> Placement:
    return Placement((width, height), (0, 0), (width, height), "1.0")


def items(*names: str) -> list[Item]:
    return [Item(name) for name in names]


def test_a_mask_has_the_path_of_its_picture_up_to_the_extension() -> None:
    pictures = items("a.jpg", "sub/a.png", "b.v1.png", "c.png", "d.JPEG", "rows/000-001")
    masks = items("a.png", "sub/a.webp", "other/c.png", "b.v1.png", "d.png", "b.png", "rows/000-001")
    pairs = pair(pictures, masks)
    assert {name: mask.name for name, mask in pairs.masks.items()} == {
        "a.jpg": "a.png",
        "sub/a.png": "sub/a.webp",
        "b.v1.png": "b.v1.png",
        "d.JPEG": "d.png",
        "rows/000-001": "rows/000-001",
    }
    assert pairs.missing == ("c.png",)
    assert pairs.unused == ("other/c.png", "b.png")


def test_two_masks_of_one_picture_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"a\.png and a\.jpg belong to the same picture"):
        pair(items("a.webp"), items("a.png", "a.jpg"))


@pytest.mark.parametrize(
    ("mask", "picture"),
    [
        ((64, 64), (64, 64)),
        ((32, 32), (64, 64)),
        ((99, 49), (199, 100)),
        ((100, 50), (199, 100)),
        ((400, 201), (199, 100)),
    ],
)
def test_a_mask_may_have_another_size(mask: tuple[int, int], picture: tuple[int, int]) -> None:
    assert misfit(mask, picture) == ""


@pytest.mark.parametrize(
    ("mask", "picture", "wanted"),
    [((64, 64), (64, 96), "64 wide must be 96 high"), ((100, 50), (50, 100), "100 wide must be 200 high")],
)
def test_another_shape_is_refused_with_the_arithmetic(
    mask: tuple[int, int], picture: tuple[int, int], wanted: str
) -> None:
    assert wanted in misfit(mask, picture)
    assert f"{mask[0]}x{mask[1]}" in misfit(mask, picture)


@pytest.mark.parametrize(
    ("image", "kind", "doubt"),
    [
        (grey([[0, 255]]), "mask", ""),
        (Image.new("1", (4, 4), 1), "mask", ""),
        (Image.new("RGB", (4, 4), (200, 190, 199)), "mask", ""),
        (grey([[0, 0]]), "mask", "black everywhere"),
        (grey([[0, 0]]), "segmentation", "black everywhere"),
        (grey([[0, 1]]), "mask", "brightest pixel is 1 of 255"),
        (grey([[0, 1]]), "segmentation", ""),
        (Image.new("RGB", (4, 4), (0, 255, 0)), "mask", "red channel alone counts, whose brightest pixel is 0"),
        (Image.new("RGB", (4, 4), (0, 255, 0)), "segmentation", ""),
        (Image.fromarray(np.full((2, 2), 65535, dtype=np.uint16)), "mask", ""),
        (Image.fromarray(np.full((2, 2), 255, dtype=np.uint16)), "mask", "black everywhere"),
        (Image.new("RGBA", (4, 4), (255, 255, 255, 255)), "mask", ""),
    ],
)
def test_what_may_not_be_meant_is_said(image: Image.Image, kind, doubt: str) -> None:
    found = check_mask(png(image), kind).doubt
    assert doubt in found
    assert bool(doubt) == bool(found)


@pytest.mark.parametrize(
    "image", [Image.new("RGBA", (4, 4), (255, 255, 255, 0)), Image.new("LA", (4, 4), (255, 254))], ids=["RGBA", "LA"]
)
def test_transparency_is_refused(image: Image.Image) -> None:
    with pytest.raises(PictureError, match="transparent"):
        check_mask(png(image), "mask")


def test_damage_is_refused() -> None:
    data = png(Image.effect_noise((64, 64), 90))
    with pytest.raises(PictureError, match="damaged"):
        check_mask(data[: len(data) // 2], "mask")


def test_weights_are_the_mean_of_a_latents_pixels() -> None:
    mask = png(grey([[255, 255, 0, 0], [255, 255, 0, 51], [0, 255, 102, 102], [0, 255, 102, 102]]))
    expected = torch.tensor([[[1.0, 51 / 4 / 255], [0.5, 102 / 255]]])
    torch.testing.assert_close(to_weights(mask, "mask", whole(4, 4), 2).float(), expected, rtol=0, atol=2e-4)
    binary = to_weights(mask, "segmentation", whole(4, 4), 2)
    assert binary.tolist() == [[[1, 1], [1, 1]]]
    assert to_weights(mask, "segmentation", whole(4, 4), 1).tolist() == [
        [[1, 1, 0, 0], [1, 1, 0, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    ]


def test_a_mask_takes_the_first_channel_and_a_segmentation_all() -> None:
    green = png(Image.new("RGB", (2, 2), (51, 255, 0)))
    assert to_weights(green, "mask", whole(2, 2), 2).item() == pytest.approx(0.2, abs=1e-4)
    assert to_weights(png(Image.new("RGB", (2, 2), (0, 1, 0))), "segmentation", whole(2, 2), 2).item() == 1


def test_16_bit_and_larger_masks() -> None:
    deep = png(Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)))
    assert to_weights(deep, "mask", whole(4, 4), 2).unique().item() == pytest.approx(128 / 255, abs=1e-3)


def test_edges_do_not_ring() -> None:
    """Lanczos would leave traces of white far into the black half, and a segmentation would count them."""
    half = np.zeros((64, 64), dtype=np.uint8)
    half[:, 32:] = 255
    for edge in (32, 128):
        assert to_weights(png(grey(half)), "segmentation", whole(edge, edge), 2)[0, 0].sum() == edge // 4


@pytest.mark.parametrize("crop_style", ["corner", "center", "random"])
@pytest.mark.parametrize("size", [(200, 96), (64, 170), (97, 203)])
def test_mask_and_picture_are_cut_alike(crop_style: str, size: tuple[int, int]) -> None:
    """The picture is its own mask: what is left of both must be the same up to the resizing filter."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    ramp = grey(255 * (x + y) / 2)
    geometry = Geometry(resolution=64, resolution_type="pixel", crop=True, crop_style=crop_style)
    placement = place(geometry, width, height, "key")
    assert isinstance(placement, Placement)
    pixels = to_pixels(ramp.convert("RGB"), placement)[:1] / 2 + 0.5
    expected = torch.nn.functional.avg_pool2d(pixels, 8)
    for scale in (1, 2):
        mask = ramp.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
        found = to_weights(png(mask), "mask", placement, 8).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    assert expected.max() - expected.min() > 0.2


def test_an_exif_orientation_turns_the_mask() -> None:
    mask = grey([[255, 0]])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    data = png(mask, exif=exif)
    assert check_mask(data, "mask").size == (1, 2)
    assert to_weights(data, "mask", whole(1, 2), 1).tolist() == [[[1], [0]]]
