"""Files are written whole or not at all."""

import os
from pathlib import Path

import pytest

from dipnet.errors import InputError
from dipnet.files import check_writable, make_folder, whole_folder, write_file


def test_writes_text_and_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_file(file, "naïve")
    assert file.read_text() == "naïve"
    write_file(file, b"\x00\xff")
    assert file.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_an_interruption_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = tmp_path / "a"
    write_file(file, "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_an_interruption_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    with whole_folder(path) as folder:
        (folder / "old").touch()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", interrupted)
        with pytest.raises(KeyboardInterrupt), whole_folder(path) as folder:
            (folder / "new").touch()
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(path) == ["old"]
    with whole_folder(path) as folder:
        (folder / "new").touch()
    assert os.listdir(path) == ["new"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "a", "does not exist; make it"),
    ):
        with pytest.raises(InputError, match=message):
            check_writable(path)
    with pytest.raises(InputError, match=r"cannot write .*/no/a: No such file or directory"):
        write_file(tmp_path / "no" / "a", "")


def test_folders(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    write_file(tmp_path / "file", "")
    with pytest.raises(InputError, match="cannot make the folder"):
        make_folder(tmp_path / "file" / "b")
