"""Which files folders stand for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.offline.files import FolderError, image_files


def test_images_come_by_name_with_those_of_folders_below(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/2.png", "a/1.webp", "c.txt", ".hidden.jpg", ".git/x.jpg", "d.jpg/e.gif", "a/.x/y.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [os.path.relpath(file, tmp_path) for file in image_files([str(tmp_path)])]
    assert found == ["a/1.webp", "a/2.png", "b.JPG", "d.jpg/e.gif"]


def test_what_is_named_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    named = [str(tmp_path / "notes.txt"), str(tmp_path / "missing"), "\0"]
    assert list(image_files(named)) == named


def test_links_are_followed_and_none_leads_back(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    (photos / "1.jpg").touch()
    (photos / "2.jpg").symlink_to(photos / "1.jpg")
    (photos / "below" / "back").symlink_to(photos)
    (photos / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "linked").symlink_to(photos)
    found = [os.path.relpath(file, tmp_path) for file in image_files([str(tmp_path / "linked")])]
    assert found == ["linked/1.jpg", "linked/2.jpg"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    files = image_files([str(tmp_path)])
    (tmp_path / "0.jpg").touch()
    assert next(files).endswith("0.jpg")
    folder.rmdir()
    assert list(files) == []
    if os.getuid() != 0:
        folder.mkdir(mode=0)
        with pytest.raises(FolderError, match="gone: permission denied"):
            list(image_files([str(tmp_path)]))
