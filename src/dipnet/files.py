"""Write files whole or not at all. Imports nothing of ours but the errors."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dipnet.errors import InputError


def write_file(path: Path, content: str | bytes) -> None:
    """Write ``content`` so that ``path`` holds either all of it or what it held before.

    It goes to a temporary name in the same folder, to the disk, and only then to ``path``. Raises
    InputError when the folder is missing or the file cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """Raise InputError when ``path`` could not be written: asked before hours of work."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give a file name")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist; make it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: no permission to write in {path.parent}")


def make_folder(path: Path) -> Path:
    """Make a folder and those above it, and return it; InputError when that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror or error}") from None
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes ``path`` when all of it is there.

    It has a temporary name in the same folder until then; an error or an interruption removes it
    and leaves what ``path`` held before. Raises OSError when it cannot be made or kept.
    """
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with open(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(_usual_mode(0o666))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path``, in the place of what is there, when it is whole.

    It has a temporary name beside it until all its files are on the disk; an error or an
    interruption removes it. Raises OSError when it cannot be made or kept.
    """
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        temporary.chmod(_usual_mode(0o777))
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _usual_mode(every: int) -> int:
    """The permissions of what is made as usual: a temporary file's are for its owner only."""
    mask = os.umask(0)
    os.umask(mask)
    return every & ~mask
