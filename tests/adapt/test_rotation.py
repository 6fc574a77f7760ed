"""A rotated model computes what it computed, and holds its inputs in fewer channels."""

from pathlib import Path

import pytest
import torch
import transformers

import dipnet
from dipnet.adapt.rotation import FAMILIES, save
from dipnet.errors import InputError
from dipnet.models.families import FAMILIES as ALL
from tests.families import FAMILIES as TINY
from tests.families import random_tokens, tiny
from tests.matrix import logits

TEXT = random_tokens(96, seed=5)
TOKENS = random_tokens(2, 12, seed=6)


@pytest.mark.parametrize("family", [name for name in TINY if name.split("-")[0] in FAMILIES])
def test_the_logits_stay(family: str) -> None:
    model = tiny(family)
    before = logits(model, TOKENS)
    found = dipnet.rotate(model, TEXT, window=24)
    # Hugging Face's norms compute in float32.
    assert torch.allclose(logits(model, TOKENS), before, rtol=1e-4, atol=1e-4)
    assert found.after > found.before
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    width = model.config.hidden_size
    assert all(
        torch.equal(m.weight, torch.ones_like(m.weight)) for m in norms if len(m.weight) == width
    )


def test_the_basis_is_that_of_the_principal_components() -> None:
    """In it, what MLPs read is uncorrelated over the text, the largest channel first."""
    model, seen = tiny("llama"), []
    dipnet.rotate(model, TEXT, window=24)
    for layer in model.get_decoder().layers:
        layer.post_attention_layernorm.register_forward_hook(
            lambda _m, _args, out: seen.append(out.flatten(0, 1))
        )
    logits(model, TEXT.view(-1, 24))
    read = torch.cat(seen)
    products = read.T @ read
    off = products - products.diag().diag()
    assert float(off.abs().max()) < 1e-3 * float(products.diag().max())
    assert products.diag().tolist() == sorted(products.diag().tolist(), reverse=True)


def test_a_tied_head_gets_weights_of_its_own_and_all_is_saved(tmp_path: Path) -> None:
    folder = tmp_path / "rotated"
    loaded = dipnet.load_model("demo-swiglu", dtype="float32", device="cpu")
    model, text = loaded.model, random_tokens(64)
    assert model.config.tie_word_embeddings
    before = logits(model, text[None])
    dipnet.rotate(model, text, window=32)
    save(folder, model, loaded.tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(logits(again, text[None]), before, atol=1e-3)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("family", sorted(set(ALL) - set(FAMILIES)))
def test_families_that_cannot(family: str) -> None:
    model = tiny(next(name for name in TINY if name.startswith(family)))
    before = model.state_dict()
    with pytest.raises(InputError, match=r"cannot be rotated.*families that can: llama"):
        dipnet.rotate(model, TEXT, window=24)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_text_without_words() -> None:
    with pytest.raises(InputError, match="text is empty"):
        dipnet.rotate(tiny("llama"), TEXT[:1], window=24)


def test_a_sparsified_model() -> None:
    model = dipnet.sparsify(tiny("llama"), dipnet.DIP(0.5))
    with pytest.raises(InputError, match="runs dip already"):
        dipnet.rotate(model, TEXT, window=24)
