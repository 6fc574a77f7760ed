"""The package's own rules: which room imports which, what an import costs, how long files are."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dipnet

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dipnet"

# A room imports only what stands above it. A new room takes its place here.
ORDER = [
    {"errors"},
    {"units", "files", "described", "_native"},
    {"registry", "kernels", "cache"},
    {"dipnet"},  # the lazy names in __init__.py
    {"methods"},
    {"store"},
    {"sim"},
    {"models"},
    {"pack"},
    {"streaming"},
    {"eval"},
    {"adapt"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
NO_TORCH = {"errors", "units", "files", "described", "registry", "cache", "dipnet", "sim"}
NO_MODELS = NO_TORCH | {"kernels", "methods", "store"}

MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
each_module = pytest.mark.parametrize("module", MODULES)


def room_of(module: str) -> str:
    """``methods/dip.py`` -> ``methods``; the package's ``__init__`` is the room ``dipnet``."""
    name = Path(module).parts[0].removesuffix(".py")
    return "dipnet" if name == "__init__" else name


def imports(path: Path) -> Iterator[str]:
    """The absolute names that a module imports anywhere but for type checking."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_room(name: str) -> str:
    """``dipnet.methods.dip.DIP`` -> ``methods``; a public name stands for where it lives."""
    first = name.split(".")[1] if "." in name else "dipnet"
    if first in dipnet._PUBLIC:
        first = dipnet._PUBLIC[first].split(".")[1]
    return "dipnet" if first == "__version__" else first


@each_module
def test_imports_point_one_way(module: str) -> None:
    room = room_of(module)
    for name in imports(MODULES[module]):
        if name.split(".")[0] == "dipnet" and imported_room(name) != room:
            assert RANK[imported_room(name)] < RANK[room], f"{module} must not import {name}"


@each_module
def test_only_the_upper_rooms_know_models(module: str) -> None:
    libraries = {name.split(".")[0] for name in imports(MODULES[module])}
    if room_of(module) in NO_MODELS:
        assert "transformers" not in libraries
    if room_of(module) in NO_TORCH:
        assert "torch" not in libraries


@pytest.mark.parametrize("module", ["dipnet", "dipnet.registry", "dipnet.units", "dipnet.cli"])
def test_importing_is_cheap(module: str) -> None:
    heavy = "{'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    code = f"import sys, {module}; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", dipnet.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(dipnet, name) is not None


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Dip'"):
        _ = dipnet.Dip


def python_files() -> list[str]:
    rooms = ("src", "tests", "training", "benchmarks")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in files)


@pytest.mark.parametrize("file", python_files())
def test_files_are_short(file: str) -> None:
    lines = (ROOT / file).read_text().splitlines()
    assert len(lines) < 400
    assert max(map(len, lines), default=0) <= 100
