"""Vectors recomputed from SimpleTuner's arithmetic, and properties that hold for every picture."""

from typing import Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kubetuner.config.sections.geometry import Geometry
from kubetuner.data.geometry import MAX_PIXELS, LeftOut, Placement, place, target_size

CENTER = Geometry(crop_style="center")


def placed(
    geometry: Geometry, width: int, height: int, seed_key: str = "key", aspect_key: str | None = None
) -> Placement:
    placement = place(geometry, width, height, seed_key, aspect_key)
    assert isinstance(placement, Placement)
    return placement


@pytest.mark.parametrize(
    "geometry", [CENTER, Geometry(crop_style="center", resolution=1.0, resolution_type="area")], ids=["px", "area"]
)
@pytest.mark.parametrize(
    ("source", "target", "bucket", "intermediary", "crop"),
    [
        ((1920, 1080), (1344, 768), "1.75", (1365, 768), (0, 10)),
        ((1080, 1920), (768, 1344), "0.57", (768, 1365), (10, 0)),
        ((1280, 768), (1344, 768), "1.75", (1344, 806), (19, 0)),
        ((3000, 2000), (1280, 832), "1.54", (1280, 853), (10, 0)),
        ((2000, 3000), (832, 1280), "0.65", (853, 1280), (0, 10)),
        ((1001, 1000), (1024, 1024), "1.0", (1025, 1024), (0, 0)),
        ((1000, 1000), (1024, 1024), "1.0", (1024, 1024), (0, 0)),
        ((1200, 1000), (1152, 960), "1.2", (1152, 960), (0, 0)),
    ],
)
def test_one_megapixel(
    geometry: Geometry,
    source: tuple[int, int],
    target: tuple[int, int],
    bucket: str,
    intermediary: tuple[int, int],
    crop: tuple[int, int],
) -> None:
    assert placed(geometry, *source) == Placement(intermediary, crop, target, bucket)


@pytest.mark.parametrize(
    ("megapixels", "square", "wide"),
    [
        (0.25, 512, (704, 384)),
        (0.5, 768, (960, 512)),
        (1.0, 1024, (1344, 768)),
        (2.0, 1536, (1856, 1024)),
        (4.0, 2048, (2624, 1472)),
    ],
)
def test_square_edges_come_from_a_table_and_others_do_not(
    megapixels: float, square: int, wide: tuple[int, int]
) -> None:
    geometry = Geometry(resolution=megapixels, resolution_type="area")
    assert target_size(geometry, 777, 777) == (square, square)
    assert target_size(geometry, 1600, 901) == wide
    cropped = Geometry(resolution=megapixels, resolution_type="area", crop=True)
    assert target_size(cropped, 1600, 901) == (square, square)


@pytest.mark.parametrize(("edge", "expected"), [(512, 512), (768, 768), (1024, 1024), (256, 256), (1500, 1472)])
def test_pixel_area_edges(edge: int, expected: int) -> None:
    assert target_size(Geometry(resolution=edge), 400, 400) == (expected, expected)


def test_every_picture_of_bucket_one_has_the_square_edge() -> None:
    """704x704 by rounding alone, but the square bucket of half a megapixel is 768x768."""
    geometry = Geometry(resolution=0.5, resolution_type="area")
    assert target_size(geometry, 1020, 1000) == (768, 768)


@pytest.mark.parametrize(
    ("resolution", "source", "target", "intermediary"),
    [
        (512, (1920, 1080), (896, 512), (910, 512)),
        (512, (1080, 1920), (512, 896), (512, 910)),
        (512, (600, 600), (512, 512), (512, 512)),
        (500, (600, 600), (512, 512), (512, 512)),
        (1024, (3000, 2000), (1536, 1024), (1536, 1024)),
        (16, (600, 600), (64, 64), (64, 64)),
    ],
)
def test_pixel(
    resolution: int, source: tuple[int, int], target: tuple[int, int], intermediary: tuple[int, int]
) -> None:
    placement = placed(Geometry(resolution=resolution, resolution_type="pixel"), *source)
    assert (placement.target_size, placement.intermediary_size) == (target, intermediary)


def test_rounding_is_half_to_even() -> None:
    assert target_size(Geometry(resolution=160, resolution_type="pixel"), 9, 9) == (128, 128)
    assert target_size(Geometry(resolution=224, resolution_type="pixel"), 9, 9) == (256, 256)


@pytest.mark.parametrize(("style", "crop"), [("center", (0, 398)), ("corner", (0, 0))])  # 1820 - 1024 pixels to spare
def test_square_crop_styles(style: Literal["center", "corner"], crop: tuple[int, int]) -> None:
    placement = placed(Geometry(crop=True, crop_style=style), 1920, 1080)
    assert placement == Placement((1820, 1024), crop, (1024, 1024), "1.0")


def test_preserve_keeps_the_bucket() -> None:
    geometry = Geometry(crop=True, crop_aspect="preserve", crop_style="center")
    assert placed(geometry, 1920, 1080) == placed(CENTER, 1920, 1080)


def test_random_crops_depend_on_the_key_alone_and_spread() -> None:
    geometry = Geometry(crop=True)
    assert placed(geometry, 1920, 1080, "a") == placed(geometry, 1920, 1080, "a")
    lefts = {placed(geometry, 1920, 1080, str(number)).crop[1] for number in range(200)}
    assert len(lefts) > 150
    assert min(lefts) < 50
    assert max(lefts) > 746
    assert max(lefts) <= 796


# By hand, E = 1024: an aspect a has the target (R64(1024 * sqrt(a)), R64(1024 / sqrt(a))); the resized picture keeps
# its own aspect and covers the target.
@pytest.mark.parametrize(
    ("source", "target", "bucket", "intermediary"),
    [
        ((1920, 1080), (1280, 832), "1.54", (1479, 832)),  # 1.78 is nearest to 1.5: 1254 and 836
        ((1000, 1300), (1024, 1024), "1.0", (1024, 1331)),  # 0.77 is nearer to 1.0 than to 0.5
        ((1000, 1400), (704, 1472), "0.48", (1051, 1472)),  # 0.71 is nearer to 0.5: 724 and 1448
        ((500, 5000), (704, 1472), "0.48", (704, 7040)),
    ],
)
def test_closest_takes_the_nearest_listed_aspect(
    source: tuple[int, int], target: tuple[int, int], bucket: str, intermediary: tuple[int, int]
) -> None:
    geometry = Geometry(
        crop=True, crop_style="corner", crop_aspect="closest", crop_aspect_buckets=((0.5, 1.0), (1.0, 1.0), (1.5, 1.0))
    )
    assert placed(geometry, *source) == Placement(intermediary, (0, 0), target, bucket)


def test_random_aspects_follow_their_weights_and_depend_on_the_aspect_key_alone() -> None:
    geometry = Geometry(
        crop=True, crop_aspect="random", crop_aspect_buckets=((1.0, 0.75), (1.5, 0.25), (0.5, 0.0)), resolution=512
    )
    keys = [f"{number}.png" for number in range(2000)]
    buckets = [placed(geometry, 900, 700, "seed", key).bucket for key in keys]
    assert set(buckets) == {"1.0", "1.43"}  # 1.5 at E = 512: 627 and 418, so 640x448
    assert 1420 < buckets.count("1.0") < 1580
    assert buckets == [placed(geometry, 900, 700, "another seed", key).bucket for key in keys]


@pytest.mark.parametrize(
    ("limits", "size", "reason"),
    [
        ({"minimum_aspect_ratio": 0.48}, (1000, 2000), ""),  # aspect 0.5, but its bucket is 704x1472: 0.48
        ({"minimum_aspect_ratio": 0.5}, (1000, 2000), "aspect ratio 0.48 is below minimum_aspect_ratio 0.5"),
        ({"maximum_aspect_ratio": 1.75}, (1920, 1080), ""),  # aspect 1.78, but its bucket is 1344x768: 1.75
        ({"maximum_aspect_ratio": 1.74}, (1920, 1080), "aspect ratio 1.75 is above maximum_aspect_ratio 1.74"),
        ({"maximum_aspect_ratio": 1.74, "crop": True}, (1920, 1080), ""),  # square crops are in bucket 1.0
    ],
)
def test_limits_of_aspect_ratios_judge_buckets(
    limits: dict[str, float | bool], size: tuple[int, int], reason: str
) -> None:
    result = place(Geometry.model_validate(limits), *size, "key")
    assert isinstance(result, Placement) is (not reason)
    if isinstance(result, LeftOut):
        assert reason in result.reason


@pytest.mark.parametrize(
    ("geometry", "size", "fits"),
    [
        (Geometry(resolution_type="pixel", resolution=512, minimum_image_size=512), (512, 900), True),
        (Geometry(resolution_type="pixel", resolution=512, minimum_image_size=512), (511, 900), False),
        (Geometry(resolution_type="area", resolution=1.0, minimum_image_size=0.25), (250, 1000), True),
        (Geometry(resolution_type="area", resolution=1.0, minimum_image_size=0.25), (250, 999), False),
        (Geometry(resolution_type="area", resolution=1.0, minimum_image_size=0.25, crop=True), (500, 500), True),
        (Geometry(resolution_type="area", resolution=1.0, minimum_image_size=0.25, crop=True), (499, 1000), False),
        (Geometry(minimum_image_size=512), (512, 512), True),
        (Geometry(minimum_image_size=512), (511, 512), False),
        (Geometry(minimum_image_size=512, crop=True, crop_aspect="preserve"), (256, 1024), True),
        (Geometry(minimum_image_size=512, crop=True), (256, 1024), False),
    ],
)
def test_minimum(geometry: Geometry, size: tuple[int, int], fits: bool) -> None:
    result = place(geometry, *size, "key")
    assert isinstance(result, Placement) is fits
    if isinstance(result, LeftOut):
        assert f"{size[0]}x{size[1]}" in result.reason
        assert "minimum_image_size" in result.reason


def test_larger_pictures_are_brought_to_the_downsample_size_before_the_crop() -> None:
    geometry = Geometry(
        resolution=512, crop=True, crop_style="center", maximum_image_size=2048, target_downsample_size=1024
    )
    assert placed(geometry, 4000, 4000) == Placement((1024, 1024), (256, 256), (512, 512), "1.0")
    assert placed(geometry, 4000, 2250) == Placement((1365, 768), (128, 426), (512, 512), "1.0")
    assert placed(geometry, 2000, 2000).intermediary_size == (512, 512)
    uncropped = geometry.model_copy(update={"crop": False})
    assert placed(uncropped, 4000, 4000).intermediary_size == (512, 512)


def test_a_downsample_size_below_the_target_still_covers_it() -> None:
    geometry = Geometry(resolution=1024, crop=True, maximum_image_size=2048, target_downsample_size=512)
    assert placed(geometry, 4000, 3000).intermediary_size == (1365, 1024)


def test_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match="0x5"):
        place(Geometry(), 0, 5, "key")


edges = st.integers(min_value=1, max_value=20_000)
geometries = st.builds(
    Geometry,
    resolution=st.one_of(st.integers(64, 2048).map(float)),
    resolution_type=st.sampled_from(["pixel", "pixel_area"]),
    crop=st.booleans(),
    crop_style=st.sampled_from(["random", "center", "corner"]),
    crop_aspect=st.sampled_from(["square", "preserve", "closest", "random"]),
    crop_aspect_buckets=st.just(((0.3, 1.0), (1.0, 0.0), (2.5, 3.0))),
    maximum_image_size=st.one_of(st.none(), st.just(1024.0)),
    target_downsample_size=st.one_of(st.none(), st.just(768.0)),
    aspect_bucket_rounding=st.integers(1, 9),
) | st.builds(Geometry, resolution=st.floats(0.05, 4.0), resolution_type=st.just("area"), crop=st.booleans())


@given(geometry=geometries, width=edges, height=edges, seed_key=st.text())
def test_every_placement_holds_together(geometry: Geometry, width: int, height: int, seed_key: str) -> None:
    placement = place(geometry, width, height, seed_key)
    assume(isinstance(placement, Placement))  # strips of a picture are left out
    assert isinstance(placement, Placement)
    target_width, target_height = placement.target_size
    wide, high = placement.intermediary_size
    assert wide * high <= MAX_PIXELS
    assert target_width % 64 == 0
    assert target_height % 64 == 0
    assert min(target_width, target_height) >= 64
    top, left = placement.crop
    assert 0 <= left <= placement.intermediary_size[0] - target_width
    assert 0 <= top <= placement.intermediary_size[1] - target_height
    assert placement.bucket == str(round(target_width / target_height, geometry.aspect_bucket_rounding))
    assert placement == placed(geometry, width, height, seed_key)


@given(width=st.integers(256, 8000), height=st.integers(256, 8000))
def test_a_resize_keeps_the_aspect_ratio_to_one_pixel(width: int, height: int) -> None:
    wide, high = placed(Geometry(), width, height).intermediary_size
    aspect = width / height
    assert abs(wide - high * aspect) <= max(1.0, aspect)


@given(width=st.integers(500, 4000), height=st.integers(500, 4000))
def test_turning_a_picture_turns_its_bucket(width: int, height: int) -> None:
    """Up to one alignment step: aspect ratios are rounded to two decimals, which is coarser below one."""
    wide, high = target_size(Geometry(), width, height)
    turned_wide, turned_high = target_size(Geometry(), height, width)
    assert abs(wide - turned_high) <= 64
    assert abs(high - turned_wide) <= 64


@pytest.mark.parametrize(
    ("threshold", "size", "reason"),
    [
        (None, (100, 100), ""),
        (0.25, (820, 820), ""),  # 1024 / 820 = 1.249
        (0.25, (819, 819), "819x819 pixels: 1024x1024 would enlarge it by 25.0 %, above max_upscale_threshold 0.25"),
        (0.0, (1024, 1024), ""),
        (0.0, (1023, 1024), "above max_upscale_threshold 0"),
        (0.1, (2000, 500), "2000x500 pixels: 2048x512 would enlarge it by 2.4 %"),
    ],
)
def test_pictures_that_would_be_enlarged_too_far_are_left_out(
    threshold: float | None, size: tuple[int, int], reason: str
) -> None:
    placement = place(CENTER.model_copy(update={"max_upscale_threshold": threshold}), *size, "key")
    if size == (2000, 500):  # within the limit of 10 %, and above one of 2 %
        assert isinstance(placement, Placement)
        placement = place(CENTER.model_copy(update={"max_upscale_threshold": 0.02}), *size, "key")
    assert isinstance(placement, LeftOut) == bool(reason)
    assert reason in str(placement)


PIXEL = Geometry(resolution=1024, resolution_type="pixel", crop_style="center")
LISTED = PIXEL.model_copy(
    update={"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": ((1.0, 1.0), (20.0, 1.0))}
)


@pytest.mark.parametrize(
    ("geometry", "size", "reason"),
    [
        (PIXEL, (5000, 1), "5000x1 pixels: it would be trained on at 5120000x1024, more than 16 times the pixels of"),
        (PIXEL, (1, 5000), "1x5000 pixels: it would be trained on at 1024x"),
        (PIXEL, (1600, 100), ""),
        (PIXEL, (1700, 100), "cut it up, or set resolution_type to pixel_area"),
        (CENTER, (5000, 1), ""),  # 72384x64
        (PIXEL.model_copy(update={"crop": True}), (5000, 1), "resized to 5120000x1024 before it is cut, more than"),
        (PIXEL.model_copy(update={"crop": True}), (8000, 100), ""),
        (LISTED, (2000, 100), ""),  # whoever lists 20.0 means it
    ],
)
def test_strips_that_would_become_far_too_many_pixels_are_left_out(
    geometry: Geometry, size: tuple[int, int], reason: str
) -> None:
    placement = place(geometry, *size, "key")
    assert isinstance(placement, LeftOut) == bool(reason)
    assert reason in str(placement)


def test_random_aspects_are_chosen_among_those_that_fit() -> None:
    """700x512 covers 512x512 as it is; 1.5 (640x448) too, and 0.5 (384x704) only when enlarged by 37.5 %."""
    geometry = Geometry(
        crop=True, crop_aspect="random", crop_aspect_buckets=((1.0, 1.0), (1.5, 1.0), (0.5, 1.0)), resolution=512
    )

    def found(threshold: float | None, size: tuple[int, int]) -> set[str]:
        limited = geometry.model_copy(update={"max_upscale_threshold": threshold})
        return {placed(limited, *size, "seed", f"{number}.png").bucket for number in range(60)}

    assert found(None, (700, 512)) == {"1.0", "1.43", "0.55"}
    assert found(0.0, (700, 512)) == {"1.0", "1.43"}
    assert found(0.4, (700, 512)) == {"1.0", "1.43", "0.55"}
    narrow = geometry.model_copy(update={"max_upscale_threshold": 0.0, "crop_aspect_buckets": ((0.5, 1.0), (1.5, 0.0))})
    assert placed(narrow, 700, 512).bucket == "1.0"  # nothing that is ever drawn fits: square
