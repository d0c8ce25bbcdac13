"""The step, on real files in every state a folder of pictures is found in."""

import logging
import os
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from kubetuner.artifacts import DatasetArtifact, Sample, read_artifact, read_rows, verify_files
from kubetuner.config.sections.sources import DatasetSource, DownloadSection
from kubetuner.digests import fingerprint, sha256_of
from kubetuner.errors import ArtifactError, DatasetError
from kubetuner.sources.local import LocalSource
from kubetuner.steps.download_dataset import download_dataset

GOOD = ("china.jpg", "deep/er/flower.webp", "scan.png", "turned.jpg", "wrongly_named.png")


def make_pictures(root: Path) -> None:
    """Five good pictures, one of them turned, one of them a JPEG called .png; one in a hidden folder."""
    china, flower = (Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg"))
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".ipynb_checkpoints").mkdir()
    china.save(root / "china.jpg")
    flower.crop((0, 0, 640, 200)).save(root / "deep" / "er" / "flower.webp")
    flower.resize((64, 48)).convert("L").save(root / "scan.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    china.save(root / "turned.jpg", exif=exif)
    flower.crop((0, 0, 200, 427)).save(root / "wrongly_named.png", format="JPEG")
    flower.save(root / ".ipynb_checkpoints" / "china.jpg")


def break_pictures(root: Path) -> None:
    whole = (root / "china.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "empty.png").touch()
    (root / "text.png").write_text("a ring")


def section(root: Path, share: float = 0.1, **settings: object) -> DownloadSection:
    source = DatasetSource.model_validate({"id": "set", "instance_data_dir": str(root), **settings})
    return DownloadSection(datasets=(source,), max_skipped_share=share)


def rows(out: Path) -> dict[str, Sample]:
    return {row.id: row for row in read_rows(out, "samples.jsonl", Sample)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    make_pictures(root)
    return root


def test_good_pictures(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    artifact = download_dataset(section(root), out)
    assert read_artifact(out, DatasetArtifact) == artifact
    verify_files(out, artifact)
    samples = rows(out)
    assert list(samples) == [f"set/{name}" for name in GOOD]
    assert artifact.num_samples == 5
    assert artifact.skipped == ()
    for name in GOOD:
        sample = samples[f"set/{name}"]
        assert (out / sample.file).read_bytes() == (root / name).read_bytes()
        assert sample.sha256 == sha256_of(root / name)
        assert sample.file.startswith(f"files/{sample.sha256[:2]}/{sample.sha256}.")
    assert (samples["set/turned.jpg"].width, samples["set/turned.jpg"].height) == (427, 640)
    assert (samples["set/china.jpg"].width, samples["set/china.jpg"].height) == (640, 427)
    assert samples["set/wrongly_named.png"].file.endswith(".jpg")
    assert samples["set/wrongly_named.png"].captions == ("wrongly named",)
    assert {"samples.jsonl"} == {entry.path for entry in artifact.files}
    assert {"samples.jsonl", *(sample.file for sample in samples.values())} == {
        path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and path.name != "artifact.json"
    }


def test_damaged_pictures_are_skipped_by_name(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_pictures(root)
    with caplog.at_level(logging.INFO):
        artifact = download_dataset(section(root, share=0.5), tmp_path / "out")
    reasons = {skip.name: skip.reason for skip in artifact.skipped}
    assert reasons.keys() == {"set/cut.jpg", "set/empty.png", "set/text.png"}
    assert "truncated" in reasons["set/cut.jpg"]
    assert reasons["set/empty.png"] == "empty file"
    assert "not a picture" in reasons["set/text.png"]
    assert artifact.num_samples == 5
    assert "skipped set/cut.jpg: damaged" in caplog.text
    assert "download_dataset: 8/8 pictures" in caplog.text
    assert "3 skipped" in caplog.text


def test_too_many_damaged_pictures_fail_the_step(root: Path, tmp_path: Path) -> None:
    break_pictures(root)
    with pytest.raises(DatasetError, match=r"'set': 3 of 8 pictures .*set/empty.png: empty file.*max_skipped_share"):
        download_dataset(section(root, share=0.37), tmp_path / "out")
    with pytest.raises(ArtifactError, match="did not finish"):
        read_artifact(tmp_path / "out", DatasetArtifact)
    assert download_dataset(section(root, share=3 / 8), tmp_path / "out").num_samples == 5


def test_every_dataset_is_judged_by_itself(root: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for number in range(7):
        (bad / f"{number}.png").touch()
    sources = [DatasetSource(id=name, instance_data_dir=str(path)) for name, path in (("a", root), ("b", bad))]
    with pytest.raises(DatasetError, match=r"^dataset 'b': 7 of 7 .*and 2 more"):
        download_dataset(DownloadSection(datasets=tuple(sources), max_skipped_share=1.0), tmp_path / "out")


def test_missing_and_empty_folders_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sources = tuple(DatasetSource(id=name, instance_data_dir=str(tmp_path / name)) for name in ("gone", "empty"))
    with pytest.raises(DatasetError, match=r"'gone': .* is not a folder.*'empty': no picture in .*\.png"):
        download_dataset(DownloadSection(datasets=sources), tmp_path / "out")


def test_missing_captions_are_skips(root: Path, tmp_path: Path) -> None:
    for name in GOOD[1:]:
        (root / name).with_suffix(".txt").write_text("one\ntwo\n")
    artifact = download_dataset(section(root, share=0.2, caption_strategy="textfile"), tmp_path / "out")
    assert [(skip.name, skip.reason) for skip in artifact.skipped] == [
        ("set/china.jpg", "caption file china.txt is missing")
    ]
    assert {row.captions for row in rows(tmp_path / "out").values()} == {("one", "two")}


def test_a_second_run_changes_nothing(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = download_dataset(section(root), out)
    before = {path: path.stat().st_mtime_ns for path in (out / "files").rglob("*") if path.is_file()}
    assert download_dataset(section(root), out) == first
    assert {path: path.stat().st_mtime_ns for path in (out / "files").rglob("*") if path.is_file()} == before


def test_a_second_run_mends_and_tidies(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = download_dataset(section(root), out)
    samples = rows(out)
    damaged = out / samples["set/scan.png"].file
    damaged.write_bytes(bytes(damaged.stat().st_size))
    (root / "china.jpg").unlink()
    second = download_dataset(section(root), out)
    verify_files(out, second)
    assert all(sha256_of(out / sample.file) == sample.sha256 for sample in rows(out).values())
    assert not (out / samples["set/china.jpg"].file).exists()
    assert second.num_samples == 4
    assert second.fingerprint != first.fingerprint


def test_the_fingerprint_is_that_of_all_samples_at_once(root: Path, tmp_path: Path) -> None:
    artifact = download_dataset(section(root), tmp_path / "out")
    samples = rows(tmp_path / "out").values()
    assert artifact.fingerprint == fingerprint("dataset", [[one.id, one.sha256, one.captions] for one in samples])


def test_the_fingerprint_is_of_content_alone(root: Path, tmp_path: Path) -> None:
    first = download_dataset(section(root), tmp_path / "1").fingerprint
    for path in root.rglob("*.jpg"):
        os.utime(path, (1, 1))
    moved = root.rename(tmp_path / "moved")
    assert download_dataset(section(moved, share=0.5), tmp_path / "2").fingerprint == first
    changes = [
        section(moved, id="other"),
        section(moved, instance_prompt=("sks",), prepend_instance_prompt=True),
    ]
    prints = {download_dataset(change, tmp_path / str(index)).fingerprint for index, change in enumerate(changes, 3)}
    Image.new("RGB", (70, 70)).save(moved / "scan.png")
    prints.add(download_dataset(section(moved), tmp_path / "5").fingerprint)
    assert len(prints | {first}) == 4


def test_equal_pictures_are_kept_once(root: Path, tmp_path: Path) -> None:
    (root / "copy.jpg").write_bytes((root / "china.jpg").read_bytes())
    artifact = download_dataset(section(root), tmp_path / "out")
    samples = rows(tmp_path / "out")
    assert samples["set/copy.jpg"].file == samples["set/china.jpg"].file
    assert artifact.num_samples == 6
    assert len([path for path in (tmp_path / "out" / "files").rglob("*") if path.is_file()]) == 5


def planned(root: Path) -> DownloadSection:
    """A section as plan hands it on."""
    listing = LocalSource(section(root).datasets[0]).listing()
    return section(root, revision=listing.revision, newest=listing.newest)


def test_what_came_after_the_plan_is_left_out(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = planned(root)
    first = download_dataset(asked, tmp_path / "out")
    assert "came after" not in caplog.text
    (root / "later.png").write_bytes((root / "scan.png").read_bytes())
    assert download_dataset(asked, tmp_path / "out").fingerprint == first.fingerprint
    assert "1 file(s) came after the run was planned and are left out: later.png" in caplog.text


def test_what_was_replaced_after_the_plan_is_named(root: Path, tmp_path: Path) -> None:
    asked = planned(root)
    (root / "scan.png").write_bytes((root / "china.jpg").read_bytes())
    with pytest.raises(
        DatasetError, match=r"'set': it has changed after the run was planned .*\(written since: scan\.png\)"
    ):
        download_dataset(asked, tmp_path / "out")
    (root / "scan.png").unlink()
    with pytest.raises(DatasetError, match="some were removed"):
        download_dataset(asked, tmp_path / "out")


def test_a_name_that_is_not_utf8_is_skipped(root: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"st\xfcck.png")
    try:
        (root / name).write_bytes((root / "scan.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    artifact = download_dataset(section(root, share=0.5), tmp_path / "out")
    assert [(skip.name, skip.reason) for skip in artifact.skipped] == [
        ("set/st\\xfcck.png", "its name is not UTF-8; rename it")
    ]
