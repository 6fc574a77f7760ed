"""A packing that is killed, or that finds the disk full, loses nothing and leaves nothing false."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dipnet
from dipnet.errors import InputError
from dipnet.pack import packing, records
from dipnet.pack.packing import pack
from dipnet.store.check import check_store
from dipnet.store.index import read_index
from tests.families import shared
from tests.matrix import allocated
from tests.pack.test_packing import same_files

Save = Callable[..., Path]


def packed_and_killed(source: Path, out: Path, moment: str) -> bool:
    """Pack in a child that kills itself before the given call of a function; whether it did.

    A fork, since eleven interpreters that import torch would take minutes.
    """
    child = os.fork()
    if child == 0:
        try:
            _die_at(moment, source, out)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _die_at(moment: str, source: Path, out: Path) -> None:
    name, _, number = moment.partition(":")
    calls = itertools.count()

    def die(*_: int) -> None:
        if next(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    if name != "progress":
        found = getattr(os, name)
        setattr(os, name, lambda *arguments: (die(), found(*arguments))[1])
    pack(str(source), out, progress=die if name == "progress" else None)


MOMENTS = [
    "progress:0", "pwrite:1", "pwrite:6", "fsync:2", "fsync:9", "progress:4", "fsync:0", "pwrite:9",
]  # fmt: skip
"""Function and number of the call; each goes on where the one before died, 22 slabs in all."""


def small_pieces(patch: pytest.MonkeyPatch) -> None:
    """Many slabs, each kept: they decide nothing but the steps of the work."""
    patch.setattr(records, "SLAB_WEIGHTS", 2000)
    patch.setattr(packing, "SECONDS_KEPT", 0.0)


def test_killed_at_any_moment(saved: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, each on what the one before left; then the last one is let through."""
    source, out = saved("llama"), tmp_path / "store"
    pack(str(source), tmp_path / "whole")
    small_pieces(monkeypatch)
    for moment in MOMENTS:
        assert packed_and_killed(source, out, moment), moment
        assert not out.exists()
        with pytest.raises(InputError, match=r"run dipnet pack again to finish it|no folder"):
            read_index(tmp_path / "store.partial")
    assert packed_and_killed(source, out, "rename:0")
    assert not out.exists()
    steps: list[int] = []
    pack(str(source), out, progress=lambda done, _: steps.append(done))
    assert not steps, "all records were done"
    assert same_files(tmp_path / "whole", out) >= 4
    assert check_store(out).rest_sha256 == read_index(tmp_path / "whole").rest_sha256


def test_killed_after_the_last_step_but_one(saved: Save, tmp_path: Path) -> None:
    """What has its name is whole, even if a trace of the packing is left in it."""
    source, out = saved("llama"), tmp_path / "store"
    assert packed_and_killed(source, out, "unlink:0")
    check_store(out)


def test_an_interrupted_packing_goes_on(
    saved: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    source, out = str(saved("opt")), tmp_path / "store"
    pack(source, tmp_path / "whole")

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, out, progress=interrupt)
    with pytest.raises(InputError, match="was begun with another weights: remove that folder"):
        pack(source, out, "int8")
    with pytest.raises(InputError, match="another block"):
        pack(source, out, block=4)
    divided = allocated(dipnet.describe(shared("opt"))).allocation
    with pytest.raises(InputError, match="another allocation"):
        pack(source, out, allocation=divided)
    steps: list[int] = []
    index = pack(source, out, progress=lambda done, _: steps.append(done))
    assert steps[0] > index.records_bytes / 2
    assert same_files(tmp_path / "whole", out) >= 4


@pytest.mark.parametrize("done", ["5", "-1", "99"])
def test_a_note_without_its_records(saved: Save, tmp_path: Path, done: str) -> None:
    """Whoever removes a file of the unfinished store gets it made again."""
    source, out = str(saved("opt")), tmp_path / "store"
    pack(source, tmp_path / "whole")

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, out, progress=interrupt)
    note = tmp_path / "store.partial" / "progress.json"
    note.write_text(note.read_text().replace('"done": 0', f'"done": {done}'))
    (tmp_path / "store.partial" / "records.bin").unlink()
    pack(source, out)
    assert same_files(tmp_path / "whole", out) >= 4


def test_a_disk_that_is_full_for_the_note(
    saved: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(InputError, match=r"no room is left for .* it goes on where it stopped"):
        pack(str(saved("opt")), tmp_path / "store")


def test_another_checkpoint(saved: Save, tmp_path: Path) -> None:
    source, out = saved("qwen2"), tmp_path / "store"

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(source), out, progress=interrupt)
    os.utime(source / "model.safetensors")
    with pytest.raises(InputError, match="begun with another checkpoint"):
        pack(str(source), out)
    (tmp_path / "store.partial" / "progress.json").write_text("{")
    with pytest.raises(InputError, match="was not made by this version of dipnet pack"):
        pack(str(source), out)


def test_two_at_a_time(saved: Save, tmp_path: Path) -> None:
    source, out = str(saved("qwen2")), tmp_path / "store"

    def again(*_: int) -> None:
        with pytest.raises(InputError, match="another dipnet pack is writing"):
            pack(source, out)

    pack(source, out, progress=again)
    check_store(out)


def test_an_existing_folder(saved: Save, tmp_path: Path) -> None:
    source = str(saved("qwen2"))
    (tmp_path / "store").mkdir()
    with pytest.raises(InputError, match="store exists already: remove it, or name another"):
        pack(source, tmp_path / "store")
    with pytest.raises(InputError, match="does not exist: make it first"):
        pack(source, tmp_path / "no" / "folder")


def test_a_file_that_may_not_grow(saved: Save, tmp_path: Path) -> None:
    source, out = str(saved("llama")), tmp_path / "store"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"no room is left for .* it goes on where it stopped"):
            pack(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not out.exists()
    pack(source, out)
    check_store(out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(saved: Save, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = str(saved("llama")), small_disk / "store"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(200_000))
    with pytest.raises(InputError, match=r"the store needs 0\.\d MB more in .* are free"):
        pack(source, out)
    monkeypatch.setattr("dipnet.pack.partial.Partial._check_space", lambda self: None)
    with pytest.raises(InputError, match=r"no room is left for .* it goes on where it stopped"):
        pack(source, out)
    assert not out.exists()
    ballast.unlink()
    pack(source, out)
    check_store(out)
