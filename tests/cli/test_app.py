"""The program around the commands: help, versions, interruptions, closed pipes."""

import subprocess
import sys

import pytest

import dipnet
from dipnet.cli import app as cli_app
from dipnet.registry import METHODS
from tests.cli.conftest import Run

HEAVY = ("torch", "transformers", "matplotlib", "numpy", "datasets")
COMMANDS = ("run", "eval", "info", "fit", "demo")
EXAMPLES = (*(each for each in COMMANDS if each != "fit"), "fit split", "fit predictors")


def loaded_by(*arguments: str) -> str:
    """What of the heavy libraries a call of the command line has imported when it ends."""
    code = (
        "import sys\n"
        "from dipnet.cli import main\n"
        f"sys.argv = ['dipnet', *{arguments!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        f"    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.strip()


def test_help_imports_nothing_heavy() -> None:
    assert loaded_by("--help") == "[]"
    assert loaded_by("eval", "--help") == "[]"


def test_version(run: Run) -> None:
    result = run("--version")
    assert (result.code, result.out) == (0, f"dipnet {dipnet.__version__}\n")


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    assert all(command in result.out for command in COMMANDS)


@pytest.mark.parametrize("command", EXAMPLES)
def test_every_command_has_an_example(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.code == 0
    assert f"Example: dipnet {command}" in result.out
    assert "<bool>" not in result.out


def test_no_arguments_show_the_help(run: Run) -> None:
    assert run() == run("--help")


def test_help_names_the_methods(run: Run) -> None:
    for command in ("run", "eval"):
        words = run(command, "--help").out.replace(",", " ").split()
        assert set(METHODS) <= set(words)


def test_python_m_dipnet() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dipnet", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"dipnet {dipnet.__version__}\n"


def test_an_interruption_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dipnet.cli.info._describe", interrupted)
    result = run("info")
    assert (result.code, result.out, result.err.strip()) == (130, "", "dipnet: interrupted")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("dipnet.cli.info._describe", broken)
    monkeypatch.setattr("sys.argv", ["dipnet", "info"])
    with pytest.raises(ZeroDivisionError):
        cli_app.main()


def test_a_closed_pipe_is_quiet(llama: str) -> None:
    command = f"{sys.executable} -m dipnet info {llama} --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
