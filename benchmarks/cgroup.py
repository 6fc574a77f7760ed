"""Runs a command in a fresh memory cgroup and says how much memory it had at its peak.

    sudo python benchmarks/cgroup.py --limit 4GiB [--evict FILE ...] -- COMMAND ...

The group is made beneath the caller's own (cgroup v1 or v2), so limits that hold already go on
holding, and it is removed afterwards. `--evict` first drops the page cache of the named files:
pages that another process has read are charged to that one, and a command that finds them there
would have more memory than its limit says. Ends with one JSON line on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6}
UNITS["GB"] = 10**9
# The shell moves itself into the group and becomes the command: no memory is charged before.
ENTER = 'echo 0 > "$0" && exec "$@"'


class CgroupError(Exception):
    """One line: what this system does not allow."""


@dataclass(frozen=True)
class Run:
    """What a command did: its exit status (negative: a signal) and the memory of its group.

    `peak` counts in bytes all that the group was charged with, its page cache included.
    """

    returncode: int
    seconds: float
    limit: int
    peak: int
    oom_kills: int
    timed_out: bool
    stdout: str


@dataclass(frozen=True)
class Files:
    """The control files of one version of cgroups; `limits` are written in this order."""

    limits: tuple[tuple[str, str], ...]
    peak: str
    events: str


V1 = Files(
    (("memory.limit_in_bytes", "{}"), ("memory.memsw.limit_in_bytes", "{}")),
    "memory.max_usage_in_bytes",
    "memory.oom_control",
)
V2 = Files((("memory.max", "{}"), ("memory.swap.max", "0")), "memory.peak", "memory.events")


def parse_size(text: str) -> int:
    """Bytes of a size such as "4GiB", "500MB" or "4096"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"not a size: {text!r}; write 4GiB or 500MB")
    return int(float(found[1]) * UNITS[found[2] or ""])


def own_group() -> tuple[Path, Files]:
    """The folder of the memory cgroup that this process is in."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    v1 = [m[1] for m in mounts if m[2] == "cgroup" and "memory" in m[3].split(",")]
    v2 = [m[1] for m in mounts if m[2] == "cgroup2"]
    if not v1 and not v2:
        raise CgroupError("no memory cgroup is mounted on this system")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") if v1 else number == "0":
            root = Path((v1 or v2)[0])
            inside = root / path.lstrip("/")
            return (inside if inside.is_dir() else root), (V1 if v1 else V2)
    raise CgroupError("this process is in no memory cgroup")


def make_group(limit: int) -> tuple[Path, Files]:
    """A new group with this limit: beneath our own or, where v2 forbids that, beside it."""
    own, files = own_group()
    for parent in [own] if files is V1 else [own, own.parent]:
        group = parent / f"dipnet-{os.getpid()}-{time.monotonic_ns()}"
        try:
            if files is V2:
                with contextlib.suppress(OSError):  # on already, or forbidden: seen below
                    (parent / "cgroup.subtree_control").write_text("+memory")
            group.mkdir()
        except OSError as error:
            raise CgroupError(f"cannot make {group}: {error.strerror}; run it as root") from None
        if (group / files.limits[0][0]).exists():
            for name, value in files.limits:
                if (group / name).exists():  # the second only where swap is accounted for
                    (group / name).write_text(value.format(limit))
            return group, files
        group.rmdir()
    raise CgroupError(f"the memory controller is not on for groups in {own}")


def remove_group(group: Path) -> None:
    """Ends what is left in the group and removes it, page cache and all."""
    for _ in range(50):
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):  # v1 only: what stays cached goes to no other group
            (group / "memory.force_empty").write_text("0")
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    raise CgroupError(f"cannot remove {group}")


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[tuple[Path, Files]]:
    """A group of this limit, removed at the end."""
    group, files = make_group(limit)
    try:
        yield group, files
    finally:
        remove_group(group)


def evict(path: Path) -> None:
    """Drops the page cache of a file, or of the files of a folder."""
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def run(
    command: Sequence[str],
    limit: int,
    evicted: Sequence[Path] = (),
    timeout: float | None = None,
    capture: bool = True,
) -> Run:
    """Runs the command in a group of `limit` bytes; what it leaves running is ended."""
    with memory_group(limit) as (group, files):
        for path in evicted:
            evict(path)
        start, late, output = time.perf_counter(), False, ""
        process = subprocess.Popen(
            ["sh", "-c", ENTER, str(group / "cgroup.procs"), *command],
            stdout=subprocess.PIPE if capture else None,
            text=True,
            start_new_session=True,
        )
        try:
            output = process.communicate(timeout=timeout)[0] or ""
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()[0] or ""
            late = isinstance(error, subprocess.TimeoutExpired)
            if not late:
                raise
        events = (group / files.events).read_text()
        kills = re.search(r"^oom_kill (\d+)$", events, re.MULTILINE)
        peak = int((group / files.peak).read_text())
        seconds = time.perf_counter() - start
        oom = int(kills[1]) if kills else 0
        return Run(process.returncode, seconds, limit, peak, oom, late, output)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=parse_size, required=True, help="such as 4GiB")
    parser.add_argument("--evict", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--timeout", type=float, help="seconds")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    try:
        done = run(args.command, args.limit, args.evict, args.timeout, capture=False)
    except (CgroupError, OSError) as error:
        print(f"{shlex.join(args.command)} was not run: {error}", file=sys.stderr)
        return 1
    report = {"command": args.command, **asdict(done)}
    del report["stdout"]
    print(json.dumps(report), file=sys.stderr)
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
