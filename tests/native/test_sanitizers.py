"""The C++ without Python, built with sanitizers: memory, undefined behaviour, data races.

One program for each ``test_*.cpp`` of this folder; a new one is found by its name.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROGRAMS = sorted(path.stem.removeprefix("test_") for path in HERE.glob("test_*.cpp"))
THREADED = sorted({"reader", "pool", "engine", "neurons"} & set(PROGRAMS))
CASES = [("address,undefined", p) for p in PROGRAMS] + [("thread", p) for p in THREADED]

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler"
)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of the programs of each sanitizer; what is built already is not built again."""
    folders = {}
    for sanitizer in dict.fromkeys(sanitizer for sanitizer, _ in CASES):
        folder = tmp_path_factory.mktemp("native") / "build"
        programs = [program for s, program in CASES if s == sanitizer]
        options = [f"-DSANITIZE={sanitizer}", f"-DPROGRAMS={';'.join(programs)}"]
        run("cmake", "-S", str(HERE), "-B", str(folder), *options)
        run("cmake", "--build", str(folder), "--parallel", str(os.cpu_count()))
        folders[sanitizer] = folder
    return folders


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("sanitizer", "program"), CASES)
def test_program(build: dict[str, Path], tmp_path: Path, sanitizer: str, program: str) -> None:
    run(str(build[sanitizer] / f"test_{program}"), str(tmp_path))
