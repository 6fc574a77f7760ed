"""Checkpoints of other names, and those that cannot be packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dipnet
from dipnet.errors import InputError
from dipnet.pack.packing import pack
from tests.families import shared
from tests.matrix import allocated
from tests.pack.test_packing import check_store, same_files

Save = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj.weight"
OWN, OTHER = (allocated(dipnet.describe(shared(f))).allocation for f in ("llama", "opt"))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights) or weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "usual", "prefix"),
    [
        ("opt", "model.decoder.", "decoder."),
        ("opt-350m", "model.decoder.", "decoder."),
        ("qwen2", "model.", "language_model.model."),
        ("llama-tied", "model.", ""),
    ],
)
def test_other_prefixes(saved: Save, tmp_path: Path, family: str, usual: str, prefix: str) -> None:
    """Of a larger model's checkpoint the decoder is taken, and nothing else."""
    folder = saved(family)
    pack(str(folder), tmp_path / "usual", "int8")
    edit_weights(
        folder,
        lambda weights: {
            **{name.replace(usual, prefix, 1): t for name, t in weights.items()},
            "vision_tower.layers.0.self_attn.q_proj.weight": torch.zeros(3, 3),
        },
    )
    index = pack(str(folder), tmp_path / "store", "int8")
    assert same_files(tmp_path / "usual", tmp_path / "store") >= 3
    check_store(tmp_path / "store", index, shared(family))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(saved: Save, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = saved("phi3")
    edit_weights(folder, lambda weights: {n: t.to(dtype) for n, t in weights.items()})
    index = pack(str(folder), tmp_path / "store")
    check_store(tmp_path / "store", index, shared("phi3"))


def test_missing_and_misshapen_tensors(saved: Save, tmp_path: Path) -> None:
    folder, out = saved("llama"), tmp_path / "store"
    edit_weights(folder, lambda weights: weights.update({UP: torch.zeros(52, 23)}))
    with pytest.raises(InputError, match=r"has the shape \(52, 23\) in the checkpoint .* \(52, 24"):
        pack(str(folder), out)
    edit_weights(folder, lambda weights: weights.pop(UP) is None)
    with pytest.raises(InputError, match=f"lacks the weights '{UP}'"):
        pack(str(folder), out)
    assert not list(tmp_path.glob("store*"))


def test_a_head_that_is_not_there(saved: Save, tmp_path: Path) -> None:
    folder = saved("llama")
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight") is None)
    with pytest.raises(InputError, match=r"lacks the weights 'lm_head.weight'"):
        pack(str(folder), tmp_path / "store")


def test_not_a_number(saved: Save, tmp_path: Path) -> None:
    """Found on the way: what is whole before it stays for a checkpoint that was mended."""
    folder = saved("llama")
    edit_weights(folder, lambda weights: weights[UP].fill_(torch.nan) is None)
    with pytest.raises(InputError, match=r"mlp.in of layer 1 of .*: a weight is NaN or infinite"):
        pack(str(folder), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_quantised_checkpoint(saved: Save, tmp_path: Path) -> None:
    folder = saved("llama")
    edit_weights(folder, lambda weights: weights.update({UP: torch.zeros(52, 3, dtype=torch.int8)}))
    with pytest.raises(InputError, match="is stored as I8: pack a checkpoint in floating point"):
        pack(str(folder), tmp_path / "store")


def test_no_safetensors(saved: Save, tmp_path: Path) -> None:
    folder = saved("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="is missing: dipnet reads safetensors only"):
        pack(str(folder), tmp_path / "store")


def test_what_is_copied(saved: Save, tmp_path: Path) -> None:
    folder = saved("llama", max_shard_size="10KB")
    for name in ("merges.txt", "chat_template.jinja", "tokenizer.model", "code.py", "x.bin"):
        (folder / name).write_text(name)
    for name in ("index.json", "allocation.json"):
        (folder / name).write_text("not a store's")
    pack(str(folder), tmp_path / "store")
    names = {file.name for file in (tmp_path / "store").iterdir()}
    ours = {"index.json", "records.bin", "rest.safetensors"}
    assert names - ours == {
        "config.json",
        "generation_config.json",
        "merges.txt",
        "chat_template.jinja",
        "tokenizer.model",
    }
    assert json.loads((tmp_path / "store" / "index.json").read_text())["version"] == 1


def test_an_allocation_goes_along(saved: Save, tmp_path: Path) -> None:
    """Given or by its file, it is a file of the store; nothing else changes but the index."""
    source, file = str(saved("llama")), tmp_path / "mine.json"
    assert isinstance(OWN, dipnet.Allocation)
    OWN.save(file)
    plain = pack(source, tmp_path / "plain")
    for name, given in (("given", OWN), ("file", file)):
        index = pack(source, tmp_path / name, allocation=given)
        assert (tmp_path / name / "allocation.json").read_bytes() == file.read_bytes()
        assert index.model_copy(update={"allocation_sha256": None}) == plain
        (tmp_path / name / "allocation.json").unlink()
        assert same_files(tmp_path / "plain", tmp_path / name) >= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "unknown kind of weights 'int3'"),
        ({"block": 0}, "block must be 'auto' or at least 1, got 0"),
        ({"block": True}, "block must be 'auto' or at least 1, got True"),
        ({"block": 7}, "--block 7 does not divide the 52 neurons"),
        ({"permutation": {0: torch.zeros(52)}}, "layer 0 must hold every neuron once"),
        ({"permutation": {0: torch.arange(51)}}, "layer 0 must hold every neuron once"),
        ({"permutation": {2: torch.arange(52)}}, "there is no layer 2"),
        ({"allocation": 0.5}, "allocation is a file of dipnet fit allocation, not 0.5"),
        ({"allocation": "no.json"}, "cannot read the allocation no.json"),
        ({"allocation": OTHER}, "this allocation is for a opt .*, and this model is a llama"),
        ({"allocation": OWN, "unit": "neuron"}, "an allocation divides densities of columns"),
    ],
)
def test_wrong_arguments(
    saved: Save, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pack(str(saved("llama")), tmp_path / "store", **options)
