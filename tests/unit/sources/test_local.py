"""Listing a folder."""

import os
from pathlib import Path

import pytest

from kubetuner.config.sections.sources import DatasetSource
from kubetuner.errors import DatasetError
from kubetuner.sources.base import ItemError, Listing
from kubetuner.sources.local import LocalSource


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def source(root: Path) -> LocalSource:
    return LocalSource(DatasetSource(id="set", instance_data_dir=str(root)))


def listing(root: Path) -> Listing:
    return source(root).listing()


def names(root: Path) -> list[str]:
    return [item.name for item in listing(root).pictures]


def test_pictures_are_sorted_and_hidden_ones_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "b.PNG", "a.jpg", "deep/er/c.webp", "deep/d.jpeg", "a.txt", "notes.md", "Thumbs.db", "e.bmp")
    touch(tmp_path, ".hidden.png", ".ipynb_checkpoints/a.jpg", "deep/.git/x.png")
    assert names(tmp_path) == ["a.jpg", "b.PNG", "deep/d.jpeg", "deep/er/c.webp", "e.bmp"]


def test_volumes_mounted_by_kubernetes_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "..2024_01/a.png", "elsewhere/b.png")
    (tmp_path / "..data").symlink_to("..2024_01")
    (tmp_path / "a.png").symlink_to("..data/a.png")
    (tmp_path / "linked").symlink_to("elsewhere")
    assert names(tmp_path) == ["a.png", "elsewhere/b.png", "linked/b.png"]


def test_a_link_to_a_folder_above_ends(tmp_path: Path) -> None:
    touch(tmp_path, "deep/a.png")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    assert names(tmp_path) == ["deep/a.png"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="gone is not a folder; check instance_data_dir"):
        listing(tmp_path / "gone")


def test_the_revision_changes_with_names_sizes_times_and_captions_only(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.txt", "sub/b.png")
    seen = [listing(tmp_path).revision]
    assert listing(tmp_path).revision == seen[0]
    touch(tmp_path, ".hidden/x.png", "notes.md")
    assert listing(tmp_path).revision == seen[0]

    status = (tmp_path / "a.png").stat()
    os.utime(tmp_path / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    seen.append(listing(tmp_path).revision)
    (tmp_path / "a.txt").write_text("another caption")
    seen.append(listing(tmp_path).revision)
    (tmp_path / "sub" / "b.png").rename(tmp_path / "sub" / "c.png")
    seen.append(listing(tmp_path).revision)
    touch(tmp_path, "d.png")
    seen.append(listing(tmp_path).revision)
    assert len(set(seen)) == 5


def test_a_broken_link_is_one_unreadable_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("nowhere.png")
    touch(tmp_path, "b.png")
    local = source(tmp_path)
    broken, _ = local.listing().pictures
    with pytest.raises(ItemError, match=r"cannot be read \(No such file"):
        local.read(broken)


def test_a_file_that_was_replaced_since_is_not_read(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    local = source(tmp_path)
    (item,) = local.listing().pictures
    assert local.read(item) == b"a.png"
    assert local.header(item, 2) == b"a."
    (tmp_path / "a.png").write_bytes(b"other")
    with pytest.raises(DatasetError, match=r"a\.png was replaced while the step ran"):
        local.read(item)
