"""The family table against the models it describes."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import dipnet
from dipnet.errors import InputError
from dipnet.models.families import Decoder, describe
from tests.families import VOCABULARY, every_family, random_tokens, shared, tiny
from tests.reference import PlainLayer


@every_family
def test_matrices_are_views_of_the_right_rows(family: str) -> None:
    model = shared(family)
    decoder = Decoder(model)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for number, layer in enumerate(model.get_decoder().layers):
        expected = PlainLayer(number, layer, model.config).weights
        for name, shape in decoder.spec.matrices.items():
            matrix = decoder.matrix(number, name)
            assert torch.equal(matrix, expected[name])
            assert tuple(matrix.shape) == shape
            assert matrix.untyped_storage().data_ptr() in parameters
        assert set(expected) == set(decoder.spec.matrices)


def test_rows_of_fused_modules() -> None:
    decoder = Decoder(shared("phi3"))
    assert [decoder.rows(name) for name in ("q", "k", "v")] == [
        slice(0, 24),
        slice(24, 32),
        slice(32, 40),
    ]
    assert [decoder.rows(name) for name in ("gate", "up")] == [slice(0, 52), slice(52, 104)]
    assert decoder.rows("down") == slice(0, 24)


def test_fused_gate_and_up_are_what_the_model_takes_them_for() -> None:
    """Silence the rows called ``gate`` and the MLP is silent: act(0) is 0, and a bias has none."""
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    for name, factor in (("gate", None), ("up", 3.0)):
        model = tiny("phi3")
        mlp = model.get_decoder().layers[0].mlp
        before = mlp(x)
        with torch.no_grad():
            Decoder(model).matrix(0, name).mul_(factor or 0)
        # Linear in ``up``, which it is not in ``gate``.
        torch.testing.assert_close(mlp(x), before * (factor or 0))


@every_family
def test_weights_of_a_token(family: str) -> None:
    """Every parameter once, but for the embedding tables: one row of each."""
    model = shared(family)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    skipped = sum((table.num_embeddings - 1) * table.embedding_dim for table in tables)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if model.config.tie_word_embeddings:  # the head is read in full, beside the token's row
        skipped -= VOCABULARY * model.get_input_embeddings().embedding_dim
    assert describe(model).weights_per_token == parameters - skipped


@every_family
def test_spec(family: str) -> None:
    spec = describe(shared(family))
    assert spec.family == family.split("-")[0]
    assert spec.layers == 2
    assert spec.gated == (not family.startswith("opt"))
    activations = {"opt": "relu", "gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh"}
    assert spec.activation == activations.get(spec.family, "silu")


def broken(family: str, path: str, module: nn.Module | None) -> PreTrainedModel:
    """A model whose second layer has another module (or none) at ``path``."""
    model = tiny(family)
    parent, _, name = path.rpartition(".")
    setattr(model.get_decoder().layers[1].get_submodule(parent), name, module)
    return model


def test_layers_of_different_sizes() -> None:
    model = broken("llama", "mlp.down_proj", nn.Linear(40, 24))
    with pytest.raises(InputError, match=r"layer 1: 'mlp.down_proj' has the shape \(24, 40\)"):
        dipnet.sparsify(model, dipnet.DIP(0.5))


def test_a_module_that_the_table_expects_and_the_model_lacks() -> None:
    model = tiny("llama")
    del model.get_decoder().layers[1].mlp.up_proj
    with pytest.raises(InputError, match=r"layer 1 .* has no module 'mlp.up_proj'"):
        dipnet.sparsify(model, dipnet.DIP(0.5))


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.zeros(52, 24, dtype=torch.int8), id="int8"),
        pytest.param(torch.zeros(52 * 12, 1, dtype=torch.uint8), id="packed"),
        pytest.param(torch.zeros(52 * 12, 1), id="another-shape"),
    ],
)
def test_quantised_weights(weight: torch.Tensor) -> None:
    """A method that reads the weights says so; one that does not never asks for them."""
    model = tiny("llama")
    up = model.get_decoder().layers[0].mlp.up_proj
    up.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(InputError, match="quantised"):
        dipnet.sparsify(model, dipnet.WINA(0.5))
    assert type(model) is type(tiny("llama"))
    dipnet.restore(dipnet.sparsify(model, dipnet.DIP(0.5)))


def test_an_input_of_embeddings() -> None:
    tokens = random_tokens(2, 5)
    model = shared("llama")
    with dipnet.sparsify(model, dipnet.DIP(0.5), prefill=2), torch.no_grad():
        expected = model(tokens).logits
        before = dipnet.usage(model).density()
        embedded = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
        assert torch.equal(embedded, expected)
        assert dipnet.usage(model).density().tokens == 2 * before.tokens
