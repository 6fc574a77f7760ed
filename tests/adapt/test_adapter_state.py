"""What a training may find where it writes: another file, or one that is no state."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import dipnet
from dipnet.adapt.adapter_state import FORMAT, STATE_NAME, Course, State, StateFile
from dipnet.errors import InputError
from tests.families import random_tokens, tiny

CPU = torch.device("cpu")
IDENTITY = {"model": "a", "window": "16"}


def state() -> State:
    course = Course(step=3, history=[(0, None, 9.0), (3, 1.5, 8.0)])
    moments = {"first": {"a": torch.ones(2)}, "second": {"a": torch.zeros(2)}}
    return State({"a": torch.rand(2)}, {"a": torch.rand(2)}, moments, course)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file, written = StateFile(tmp_path, IDENTITY), state()
    assert file.read(CPU) is None
    file.write(written)
    found = file.read(CPU)
    assert found is not None
    assert found.course == written.course
    assert {n: t.tolist() for n, t in found.tensors().items()} == {
        n: t.tolist() for n, t in written.tensors().items()
    }
    with pytest.raises(InputError, match="is of a training with another window"):
        StateFile(tmp_path, {**IDENTITY, "window": "17"}).read(CPU)


@pytest.mark.parametrize("course", ["{}", "[]", '{"history": 3}', '{"history": [], "more": 1}'])
@pytest.mark.parametrize("whole", [False, True])
def test_a_file_that_is_no_state(tmp_path: Path, whole: bool, course: str) -> None:
    tensors = state().tensors() if whole else {}
    said = {"format": FORMAT, "identity": json.dumps(IDENTITY), "course": course}
    (tmp_path / STATE_NAME).write_bytes(save(tensors, metadata=said))
    with pytest.raises(InputError, match="is damaged or no state of a training"):
        StateFile(tmp_path, IDENTITY).read(CPU)


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_what_was_not_made_by_this_training_stays(tmp_path: Path, name: str) -> None:
    kept = tmp_path / name / "kept"
    kept.parent.mkdir()
    kept.touch()
    with pytest.raises(InputError, match=f"{name} is there and would be replaced"):
        dipnet.fit_adapters(tiny("llama"), dipnet.DIP(0.5), random_tokens(256), out=tmp_path)
    assert kept.exists()
