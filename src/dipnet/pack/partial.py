"""The unfinished store, OUT.partial: it keeps what is done, and becomes OUT in one step."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from dipnet.errors import InputError
from dipnet.files import make_folder, write_file

PROGRESS_NAME = "progress.json"
TRACES = ".*"
"""What a killed process leaves of a file that it was about to replace."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Partial:
    """A store while it is written. Use as a context manager; ``done`` slabs are on the disk.

    Raises InputError when OUT exists, OUT.partial is of another packing or in use by another
    process, or the disk lacks the room.
    """

    def __init__(self, out: Path, arguments: dict[str, Any], sizes: dict[str, int]) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.arguments = arguments
        self.sizes = sizes
        self.done = 0
        self._open = ExitStack()
        self._files: dict[str, int] = {}

    def __enter__(self) -> Self:
        _check_absent(self.out)
        with self._open, self._errors():
            make_folder(self.folder)
            self._lock()
            self.done = self._read_progress()
            self._check_space()
            for name, size in self.sizes.items():
                self._files[name] = self._open_file(name, size)
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """Write all of ``data`` at ``offset`` of a file; from any thread."""
        rest = memoryview(data).cast("B")
        with self._errors():
            while rest:
                written = os.pwrite(self._files[name], rest, offset)
                rest, offset = rest[written:], offset + written

    def read(self, name: str) -> Iterator[bytes]:
        """The pieces of a file, from its beginning."""
        offset = 0
        while piece := os.pread(self._files[name], 16 << 20, offset):
            offset += len(piece)
            yield piece

    def keep(self, done: int) -> None:
        """Bring all that was written to the disk, and note that so many slabs are done."""
        with self._errors():
            for number in self._files.values():
                os.fsync(number)
        self._write_progress(done)

    def add(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with self._errors():
            write_file(self.folder / name, content)

    def finish(self) -> None:
        """Bring everything to the disk and give the folder its name."""
        with self._errors():
            for number in self._files.values():
                os.fsync(number)
            sync_folder(self.folder)
            _check_absent(self.out)
            self.folder.rename(self.out)
            sync_folder(self.out.parent)
            (self.out / PROGRESS_NAME).unlink()
            sync_folder(self.out)

    def _lock(self) -> None:
        """Keep other processes from packing into the same folder; ends with this process."""
        number = os.open(self.folder, os.O_RDONLY)
        self._open.callback(os.close, number)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another dipnet pack is writing {self.folder}: wait for it, or name another folder"
            ) from None

    def _read_progress(self) -> int:
        """The number of slabs that an earlier run finished; InputError when it was another one."""
        file = self.folder / PROGRESS_NAME
        if not set(self.folder.iterdir()) - set(self.folder.glob(TRACES)):
            self._write_progress(0)
        try:
            found = json.loads(file.read_bytes())
            done, arguments = max(0, int(found["done"])), dict(found["arguments"])
        except (OSError, ValueError, KeyError, TypeError):
            raise self._foreign("was not made by this version of dipnet pack") from None
        for name, value in self.arguments.items():
            if arguments.get(name) != json.loads(json.dumps(value)):
                raise self._foreign(f"was begun with another {name}")
        for trace in self.folder.glob(TRACES):
            trace.unlink()
        files = [(self.folder / name, size) for name, size in self.sizes.items()]
        whole = all(file.is_file() and file.stat().st_size == size for file, size in files)
        return done if whole else 0

    def _foreign(self, reason: str) -> InputError:
        return InputError(
            f"{self.folder} {reason}: remove that folder to begin anew, repeat its own command to "
            "finish it, or name another folder"
        )

    def _write_progress(self, done: int) -> None:
        state = {"arguments": self.arguments, "done": done}
        self.add(PROGRESS_NAME, json.dumps(state).encode())
        sync_folder(self.folder)

    def _check_space(self) -> None:
        """Ask for the room that is still needed, before hours of work."""
        held = sum(
            file.stat().st_blocks * 512
            for name in self.sizes
            if (file := self.folder / name).is_file()
        )
        needed = sum(self.sizes.values()) - held
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"the store needs {_size(needed)} more in {self.folder.parent}, and {_size(free)} "
                "are free: make room, or name a folder on another disk"
            )

    def _open_file(self, name: str, size: int) -> int:
        number = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._open.callback(os.close, number)
        os.ftruncate(number, size)
        return number

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, InputError) as raised:
            # An error of ours may stand for one of the system: of write_file, for one.
            error = raised if isinstance(raised, OSError) else raised.__context__
            if isinstance(error, OSError) and error.errno in FULL:
                raise InputError(
                    f"no room is left for {self.folder} ({error.strerror}): make room and repeat "
                    "the command, it goes on where it stopped"
                ) from None
            if isinstance(raised, InputError):
                raise
            raise InputError(f"cannot write {self.folder}: {raised.strerror or raised}") from None


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _check_absent(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists already: remove it, or name another folder")
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist: make it first")


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
