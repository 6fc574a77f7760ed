"""Every family packs, and what is read back is what was in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from dipnet.errors import InputError
from dipnet.models.families import Decoder
from dipnet.models.load import load_model
from dipnet.pack import checkpoint, records, rest
from dipnet.pack.packing import pack
from dipnet.pack.plan import automatic_block
from dipnet.store.geometry import UNITS, WEIGHTS, Unit, Weights
from dipnet.store.index import Index, read_index
from tests.families import every_family, random_tokens, shared, tiny
from tests.pack.reading import Floats, read_group

Save = Callable[..., Path]
BOUNDS = {"int4": 0.26, "int8": 0.0041, "bf16": 2.0**-8}
"""Worst error, of the group's largest weight: 4 bits clip at 6/8, the others round."""
TYPICAL = {"int4": 0.15, "int8": 0.012, "bf16": 0.003}
"""Root mean square error, of the weights' own."""


def check_group(found: Mapping[str, Floats], expected: Mapping[str, Tensor], kind: str) -> None:
    """Whether the matrices of a group are what they were, but for rounding."""
    weights = {matrix: tensor.detach().float().numpy() for matrix, tensor in expected.items()}
    assert {m: v.shape for m, v in found.items()} == {m: v.shape for m, v in weights.items()}
    wrong = np.concatenate([(found[matrix] - weights[matrix]).ravel() for matrix in weights])
    right = np.concatenate([values.ravel() for values in weights.values()])
    assert np.abs(wrong).max() <= BOUNDS[kind] * np.abs(right).max()
    assert np.square(wrong).mean() ** 0.5 <= TYPICAL[kind] * np.square(right).mean() ** 0.5


def check_store(store: Path, index: Index, model: PreTrainedModel, step: int = 1) -> None:
    """Whether a store holds every so many columns of the model's matrices, read the slow way."""
    decoder = Decoder(model)
    for group in index.groups:
        expected = {"head": model.get_output_embeddings().weight}
        if group.layer is not None:
            layer = group.layer
            expected = {matrix: decoder.matrix(layer, matrix) for matrix in group.matrices}
        by_rows = set(expected) - {"down"} if group.name == "mlp.neuron" else set()
        expected = {
            matrix: weights[::step] if matrix in by_rows else weights[:, ::step]
            for matrix, weights in expected.items()
        }
        check_group(read_group(store, group.layer, group.name, step), expected, index.weights)


@every_family
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("unit", UNITS)
def test_every_family(
    saved: Save, tmp_path: Path, family: str, weights: Weights, unit: Unit
) -> None:
    index = pack(str(saved(family)), tmp_path / "store", weights, unit=unit)
    check_store(tmp_path / "store", index, shared(family))
    assert read_index(tmp_path / "store") == index
    assert not (tmp_path / "store.partial").exists()
    assert not (tmp_path / "store" / "progress.json").exists()


@every_family
@pytest.mark.parametrize("unit", UNITS)
def test_the_rest(saved: Save, tmp_path: Path, family: str, unit: Unit) -> None:
    index = pack(str(saved(family)), tmp_path / "store", unit=unit)
    stored = load_file(tmp_path / "store" / "rest.safetensors")
    scales = {group.scale_name: (group.units * group.columns,) for group in index.groups}
    assert scales == {n: tuple(t.shape) for n, t in stored.items() if n.startswith("scale.")}
    kept = {name: tensor for name, tensor in stored.items() if name not in scales}
    model = shared(family)
    assert set(kept) == set(model.state_dict()) - grouped_names(model)
    for name, tensor in kept.items():
        table = "embed_" in name
        assert tensor.dtype == (torch.bfloat16 if table else torch.float32)
        expected = model.state_dict()[name]
        assert torch.equal(tensor, expected.to(torch.float32).to(tensor.dtype))


def grouped_names(model: PreTrainedModel) -> set[str]:
    decoder = Decoder(model)
    groups = [
        decoder.holder(layer, matrix).weight
        for layer in range(decoder.spec.layers)
        for matrix in decoder.spec.matrices
    ]
    held = {id(weight) for weight in groups}
    return {n for n, p in model.named_parameters() if id(p) in held} | {"lm_head.weight"}


@pytest.mark.parametrize("unit", UNITS)
def test_a_demo_model(tmp_path: Path, unit: Unit) -> None:
    index = pack("demo-relu", tmp_path / "store", "int8", unit=unit)
    loaded = load_model("demo-relu", device="cpu")
    check_store(tmp_path / "store", index, loaded.model, step=150)
    assert AutoConfig.from_pretrained(tmp_path / "store").model_type == "opt"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "store")
    assert tokenizer.encode("The ship") == loaded.tokenizer.encode("The ship")


@pytest.mark.parametrize("unit", UNITS)
def test_shards_and_half_precision(saved: Save, tmp_path: Path, unit: Unit) -> None:
    """Several files, read in pieces of a few rows, give the same bytes as one."""
    one = pack(str(saved("phi3")), tmp_path / "one", "int8", unit=unit)
    pieces = saved("phi3", max_shard_size="10KB")
    assert len(list(pieces.glob("*.safetensors"))) > 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "MAPPED_BYTES", 1000)
        patch.setattr(records, "SLAB_WEIGHTS", 1000)
        patch.setattr(rest, "PIECE_BYTES", 100)
        many = pack(str(pieces), tmp_path / "many", "int8", unit=unit)
    assert same_files(tmp_path / "one", tmp_path / "many") >= 3
    assert one.groups == many.groups


def same_files(one: Path, other: Path) -> int:
    """The number of files of two stores but the index, which agree to the byte."""
    names = {file.name for file in one.iterdir()} - {"index.json"}
    assert names == {file.name for file in other.iterdir()} - {"index.json"}
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    return len(names)


@pytest.mark.parametrize("family", ["llama-biases", "phi3", "opt"])
def test_permuted_neurons(saved: Save, tmp_path: Path, family: str) -> None:
    """The store holds the permuted model, which computes what the model does."""
    neurons = Decoder(shared(family)).spec.matrices["down"][1]
    order = torch.randperm(neurons)
    folder = saved(family)
    index = pack(str(folder), tmp_path / "store", "bf16", block=4, permutation={1: order})
    assert index.neurons_permuted
    assert [group.block for group in index.groups if group.name == "mlp.hidden"] == [4, 4]
    model = tiny(family)
    tokens = random_tokens(2, 12)
    before = model(input_ids=tokens).logits
    permute(model, 1, order)
    assert torch.allclose(model(input_ids=tokens).logits, before)
    check_store(tmp_path / "store", index, model)
    kept = load_file(tmp_path / "store" / "rest.safetensors")
    biases = [name for name in kept if name.endswith(("fc1.bias", "up_proj.bias"))]
    assert len(biases) == (0 if family == "phi3" else 2)
    for name in biases:
        assert torch.equal(kept[name], model.state_dict()[name].float())


def permute(model: PreTrainedModel, layer: int, order: Tensor) -> None:
    """Put the neurons of a layer in another order."""
    decoder = Decoder(model)
    with torch.no_grad():
        for matrix in decoder.spec.input_matrices:
            weights = decoder.matrix(layer, matrix)
            weights.copy_(weights[order].clone())
            bias = decoder.holder(layer, matrix).bias
            if bias is not None:
                bias.copy_(bias[order].clone())
        down = decoder.matrix(layer, "down")
        down.copy_(down[:, order].clone())


@pytest.mark.parametrize(
    ("weights", "outputs", "channels", "block"),
    [
        ("int4", 5120, 17920, 2),  # 2752 bytes a column
        ("int4", 16384, 53248, 1),
        ("bf16", 5120, 17920, 1),
        ("int4", 5120, 17921, 1),  # no multiple of 2
        ("int4", 448, 1280, 1),  # 2 columns of it are still small
    ],
)
def test_automatic_blocks(weights: Weights, outputs: int, channels: int, block: int) -> None:
    assert automatic_block(weights, outputs, channels) == block


def test_what_whole_neurons_have_no_use_for(saved: Save, tmp_path: Path) -> None:
    folder = str(saved("llama"))
    asked: list[tuple[dict[str, Any], str]] = [
        ({"block": 2}, "a record of a whole neuron holds one: leave out block 2"),
        ({"permutation": {0: torch.arange(52)}}, "leave out the permutation"),
        ({"unit": "row"}, "no unit 'row'|unknown unit 'row'"),
    ]
    for options, message in asked:
        with pytest.raises(InputError, match=message) as caught:
            pack(folder, tmp_path / "store", **{"unit": "neuron", **options})
        assert "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["llama"]


def test_another_unit_is_another_packing(saved: Save, tmp_path: Path) -> None:
    folder = str(saved("llama"))

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "store", "int8", progress=interrupt)
    with pytest.raises(InputError, match="was begun with another unit"):
        pack(folder, tmp_path / "store", "int8", unit="neuron")
