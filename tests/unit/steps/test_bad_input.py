"""Folders as people really have them: every odd file is either used rightly or named with a reason."""

import codecs
import contextlib
import io
import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kubetuner.artifacts import DatasetArtifact, Sample, TextRow, read_rows
from kubetuner.config.sections.sources import DatasetSource, DownloadSection
from kubetuner.config.sections.steps import CacheTextSection, ModelRef
from kubetuner.data.pictures import open_picture
from kubetuner.errors import ConfigError
from kubetuner.steps.cache_text_embeds import cache_text_embeds
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import Plan, make_plan
from pipelines.recipes.demo.models import build_pipeline, write_pipeline
from tests.servers.dataset_hub import DatasetHub, DatasetRepo
from tests.unit.data.test_pictures import png_claiming

RED, BLUE = (255, 0, 0), (0, 0, 255)
CONFIG: dict[str, Any] = {
    "model_type": "full", "model_family": "sdxl", "train_batch_size": 1, "max_train_steps": 2, "max_skipped_share": 0.5,
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three good pictures; tests add a bad one."""
    folder = tmp_path / "set"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(folder / f"good_{index}.png")
    return folder


def planned(root: Path, **more: Any) -> Plan:
    data = [{"id": "set", "instance_data_dir": str(root), "resolution": 64, **more}]
    return make_plan({**CONFIG, **({"caption_strategy": "textfile"} if more else {})}, data, cwd=root)


def downloaded(root: Path, **settings: Any) -> tuple[DatasetArtifact, dict[str, Sample]]:
    source = DatasetSource.model_validate({"id": "set", "instance_data_dir": str(root), **settings})
    out = root.parent / "out"
    artifact = download_dataset(DownloadSection(datasets=(source,), max_skipped_share=0.5), out)
    return artifact, {row.id: row for row in read_rows(out, "samples.jsonl", Sample)}


def skipped(artifact: DatasetArtifact) -> dict[str, str]:
    return {skip.name: skip.reason for skip in artifact.skipped}


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Rights do not bind root, so for root: as another user."""
    if os.geteuid() != 0:
        yield
        return
    codecs.lookup("utf-8-sig")  # found on disk, where the other user may not look
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared_root() -> Iterator[Path]:
    """``root`` where any user may read and write."""
    base = Path(tempfile.mkdtemp())
    folder = base / "set"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(folder / f"good_{index}.png")
    base.chmod(0o777)
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(base)


def whole() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((200, 200), 80).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "data", "reason", "in_plan"),
    [
        ("cut.jpg", whole()[:4000], "truncated", False),  # a plan reads headers, and this one has a whole header
        ("head.png", png_claiming(64, 64)[:20], "damaged|not a picture", True),
        ("empty.png", b"", "empty file", True),
        ("large.png", png_claiming(11_000, 11_000), "more than 89478485 pixels", True),
        ("bomb.png", png_claiming(100_000, 100_000), "more than 89478485 pixels", True),
        ("poem.png", b"not a picture at all", "not a picture", True),
        ("page.jpg", b"<!doctype html><title>404</title>", "not a picture", True),
        ("phone.HEIC", b"\0\0\0\x18ftypheic", "not a picture in a format that Pillow knows", True),
    ],
    ids=["truncated", "cut header", "empty", "large", "bomb", "text", "page", "phone"],
)
def test_a_file_that_is_no_picture_is_named(
    root: Path, caplog: pytest.LogCaptureFixture, name: str, data: bytes, reason: str, in_plan: bool
) -> None:
    (root / name).write_bytes(data)
    plan = planned(root)
    assert plan.summary["samples"] == {"set": 3 if in_plan else 4}
    if in_plan:
        (line,) = [line for line in plan.markdown.splitlines() if f"set/{name}" in line]
        assert any(part in line for part in reason.split("|"))
    artifact, samples = downloaded(root)
    assert len(samples) == 3
    (told,) = skipped(artifact).values()
    assert any(part in told for part in reason.split("|"))
    assert f"skipped set/{name}" in caplog.text


def save_sixteen_bit(path: Path) -> None:
    Image.new("I;16", (64, 64), 0xFF00).save(path)


def save_cmyk(path: Path) -> None:
    Image.new("RGB", (64, 64), RED).convert("CMYK").save(path, quality=95)


def save_palette(path: Path) -> None:
    Image.new("RGB", (64, 64), RED).quantize(4).save(path)


def save_plain(path: Path) -> None:
    Image.new("RGB", (64, 64), RED).save(path)


def save_animated(path: Path) -> None:
    Image.new("RGB", (64, 64), RED).save(path, save_all=True, append_images=[Image.new("RGB", (64, 64), BLUE)] * 3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "save", "colour"),
    [
        ("a.png", save_sixteen_bit, (255, 255, 255)),
        ("a.tif", save_sixteen_bit, (255, 255, 255)),
        ("a.jpg", save_cmyk, RED),
        ("a.png", save_palette, RED),
        ("a.gif", save_palette, RED),
        ("a.gif", save_animated, RED),
        ("a.webp", save_animated, RED),
        ("a.png", save_animated, RED),
        ("a.tif", save_animated, RED),
        ("a.apng", save_animated, RED),
        ("a.tga", save_plain, RED),
        ("a.jpe", save_cmyk, RED),
    ],
)
def test_unusual_pictures_are_used_as_they_look(root: Path, name: str, save: Any, colour: tuple[int, ...]) -> None:
    save(root / name)
    assert planned(root).summary["samples"] == {"set": 4}
    artifact, samples = downloaded(root)
    assert artifact.skipped == ()
    sample = samples[f"set/{name}"]
    assert (sample.width, sample.height) == (64, 64)
    shown = open_picture(root.parent / "out" / sample.file)
    assert shown.getpixel((30, 30)) == pytest.approx(colour, abs=4)


def test_too_many_unreadable_pictures_are_found_by_the_plan(root: Path) -> None:
    for index in range(4):
        (root / f"bad_{index}.png").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"4 of 7 pictures cannot be used .*bad_0\.png: not a picture.*max_skipped"):
        planned(root)


def test_a_picture_without_rights_is_named(shared_root: Path) -> None:
    (shared_root / "good_0.png").chmod(0)
    with as_nobody():
        plan = planned(shared_root)
        artifact, samples = downloaded(shared_root)
    assert plan.summary["skipped"] == {"set": 1}
    assert "set/good_0.png`: cannot be read (Permission denied)" in plan.markdown
    assert skipped(artifact) == {"set/good_0.png": "cannot be read (Permission denied)"}
    assert len(samples) == 2


def test_a_folder_without_rights_is_named(shared_root: Path) -> None:
    (shared_root / "inner").mkdir(mode=0)
    with (
        as_nobody(),
        pytest.raises(ConfigError, match=r"inner cannot be listed \(Permission denied\); check its rights"),
    ):
        planned(shared_root)
    (shared_root / "inner").chmod(0o755)


def test_a_caption_without_rights_is_named(shared_root: Path) -> None:
    for index in range(3):
        (shared_root / f"good_{index}.txt").write_text("a caption")
    (shared_root / "good_1.txt").chmod(0)
    with as_nobody():
        artifact, _ = downloaded(shared_root, caption_strategy="textfile")
    assert skipped(artifact) == {"set/good_1.png": "caption file good_1.txt cannot be read (Permission denied)"}


@pytest.mark.parametrize("target", ["nowhere.png", "link.png", "b.png"])
def test_links_that_lead_nowhere_are_named(root: Path, target: str) -> None:
    """Broken, to itself, and two in a circle."""
    (root / "link.png").symlink_to(target)
    if target == "b.png":
        (root / "b.png").symlink_to("link.png")
    assert "`set/link.png`: cannot be read (" in planned(root).markdown
    artifact, samples = downloaded(root)
    assert len(samples) == 3
    assert skipped(artifact)["set/link.png"].startswith("cannot be read (")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_named_and_not_waited_for(root: Path, kind: str) -> None:
    """A pipe nobody writes to would be read for ever, and a device without end."""
    os.mkfifo(root / "odd.png") if kind == "pipe" else (root / "odd.png").symlink_to("/dev/zero")
    assert "`set/odd.png`: is not a file but a pipe, a device or the like" in planned(root).markdown
    artifact, samples = downloaded(root)
    assert len(samples) == 3
    assert skipped(artifact) == {"set/odd.png": "is not a file but a pipe, a device or the like"}


def test_a_circle_of_folders_ends(root: Path) -> None:
    (root / "deep").mkdir()
    (root / "deep" / "up").symlink_to(root)
    (root / "deep" / "self").symlink_to("self")
    Image.new("RGB", (64, 64), BLUE).save(root / "deep" / "x.png")
    assert planned(root).summary["samples"] == {"set": 4}
    assert len(downloaded(root)[1]) == 4


NAMES = ['it\'s "quoted".png', "two\nlines.png", "🐈 cat 猫.png", "a`b|c.png", " spaced .png", "-rf.png", "100%{x}.png"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("good", [True, False])
def test_odd_names(root: Path, caplog: pytest.LogCaptureFixture, name: str, good: bool) -> None:
    if good:
        Image.new("RGB", (64, 64), BLUE).save(root / name)
    else:
        (root / name).write_bytes(b"no")
    plan = planned(root)
    with caplog.at_level(logging.INFO):
        artifact, samples = downloaded(root)
    if good:
        assert samples[f"set/{name}"].captions == (Path(name).stem.replace("_", " ").strip(),)
        return
    assert list(skipped(artifact)) == [f"set/{name}"]
    assert len(plan.markdown.partition("## Skipped pictures")[2].partition("##")[0].strip().splitlines()) == 1
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_a_name_that_is_not_utf8_is_named_by_the_plan_too(root: Path) -> None:
    try:
        shutil.copy(root / "good_0.png", os.fsdecode(bytes(root) + b"/st\xfcck.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    plan = planned(root)
    assert plan.summary["samples"] == {"set": 3}
    assert "`set/st\\udcfcck.png`: its name is not UTF-8; rename it" in plan.markdown
    assert skipped(downloaded(root)[0]) == {"set/st\\xfcck.png": "its name is not UTF-8; rename it"}


def test_two_files_of_one_stem_are_two_samples(root: Path) -> None:
    for suffix in ("png", "jpg", "webp"):
        Image.new("RGB", (64, 64), {"png": RED, "jpg": BLUE, "webp": (0, 255, 0)}[suffix]).save(root / f"x.{suffix}")
    for path in root.glob("good_*.png"):
        path.unlink()
    (root / "x.txt").write_text("one caption for all")
    assert planned(root, caption_strategy="textfile").summary["samples"] == {"set": 3}
    _, samples = downloaded(root, caption_strategy="textfile")
    assert len({sample.sha256 for sample in samples.values()}) == 3
    assert {sample.captions for sample in samples.values()} == {("one caption for all",)}


LONG = " ".join(f"word{number}" for number in range(10_000))
CAPTIONS = {
    "ja": "夕暮れの神社、石灯籠と紅葉",
    "hi": "सूर्यास्त के समय मंदिर",
    "es": "un niño señala el pingüino: ¡qué mañana!",
    "empty": "",
    "long": LONG,
    "emoji": "👩‍👩‍👧 family",
}


@pytest.mark.parametrize("family", ["pixart_sigma", "sdxl", "sana"])
def test_captions_of_all_kinds_are_encoded(root: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBETUNER_STORE", raising=False)
    for path in root.iterdir():
        path.unlink()
    for index, (name, caption) in enumerate(CAPTIONS.items()):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(caption, encoding="utf-8")
    artifact, samples = downloaded(root, caption_strategy="textfile")
    assert artifact.skipped == ()
    assert {sample.captions for sample in samples.values()} == {(caption,) for caption in CAPTIONS.values()}
    base = root.parent / "base"
    write_pipeline(build_pipeline(family, "unit"), base)
    section = CacheTextSection(model=ModelRef.model_validate({"family": family, "path": str(base)}))
    embeds = cache_text_embeds(section, root.parent / "out", root.parent / "texts")
    assert embeds.num_texts == len(CAPTIONS)  # the empty caption is the dropped one, too
    assert {row.text for row in read_rows(root.parent / "texts", "texts.jsonl", TextRow)} == set(CAPTIONS.values())
    assert sum(shard.bytes for shard in embeds.shards) < 2_000_000


CLIMBING = ["../../escaped.png", "/escaped.png", "a/../../../escaped.png", "..\\escaped.png"]


def test_names_that_climb_out_are_names_and_no_paths(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows of a published table, and members of an archive among the pictures: nothing is written by such a name."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pictures = [path.read_bytes() for path in sorted(root.iterdir())]
    cells = [
        {"image": {"bytes": pictures[index % 3], "path": name}, "text": "a"} for index, name in enumerate(CLIMBING)
    ]
    stream, packed = io.BytesIO(), io.BytesIO()
    pq.write_table(pa.Table.from_pylist(cells), stream)
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../../escaped.png"))
    (root / "pictures.tar").write_bytes(packed.getvalue())
    with DatasetHub() as hub:
        hub.repos["team/set"] = DatasetRepo()
        hub.repos["team/set"].commit({"data/train.parquet": stream.getvalue()})
        monkeypatch.setenv("HF_ENDPOINT", f"http://{hub.host}")
        columns = {"name": "team/set", "caption_column": "text"}
        there = {"type": "huggingface", "hub": columns, "instance_data_dir": "", "caption_strategy": "huggingface"}
        _, samples = downloaded(root, **there)
    assert [Path(name).name.rpartition("\\")[2] for name in samples] == ["escaped.png"] * 4
    assert len(downloaded(root)[1]) == 3  # Archives are not opened.
    assert [path.name for path in Path(tmp_path).rglob("*escaped*")] == []
    assert not Path("/escaped.png").exists()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != root]
    assert all(path.is_relative_to(tmp_path / "out") for path in files)
