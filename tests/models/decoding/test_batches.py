"""Several sequences decoded together: each as by the reference, however they share weights."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import dipnet
from dipnet.models.attach import ATTACHED
from dipnet.models.decoding import loop, sites
from dipnet.models.decoding.sharing import MOST_ROWS
from tests.models.decoding.test_decoding import (
    CLOSE,
    DEVICE,
    LOOPED,
    OTHERS,
    float_model,
    thresholds,
)
from tests.models.skipping.decoding import dejavu, tokens

WAYS = ("own", "union", "whole")
PROMPT = 6
each_way = pytest.mark.parametrize("way", WAYS)
WHOLE = ("llama", "opt")
"""Families that take every way; the others take one of them."""
OF_OTHERS = zip((f for f in (*LOOPED, *OTHERS) if f not in WHOLE), cycle(WAYS), strict=False)
FAMILIES = [*product(WHOLE, WAYS), *OF_OTHERS]


def methods(family: str, model: PreTrainedModel) -> list[Any]:
    """Each kind of product that sequences can share."""
    found: list[Any] = [dipnet.DIP(0.5, attention_density=0.5, hidden_block=4), dejavu(family)]
    if family == "llama":
        found += [dipnet.GatePruning(0.6), dipnet.UpPruning(0.6), dipnet.DIP(0.5)]
        found += [thresholds(dipnet.TEAL(0.6), model), thresholds(dipnet.CATS(0.6), model)]
        found += [dejavu(family, head_density=None), dipnet.Dense()]
    return found


def ragged(rows: int, columns: int = PROMPT) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths, padded in front, and their attention mask."""
    padding = torch.tensor([(3 * row) % (columns - 1) for row in range(rows)])
    mask = (torch.arange(columns) >= padding[:, None]).long().to(DEVICE)
    return tokens(rows, columns, seed=rows).to(DEVICE) * mask, mask


@torch.no_grad()
def decoded(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of all tokens: those of the prompts in one call, the others one by one."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    past, made = DynamicCache(config=model.config), []
    parts = [PROMPT] + [1] * (ids.shape[1] - PROMPT)
    end = 0
    for part, at in zip(ids.split(parts, dim=1), positions.split(parts, dim=1), strict=True):
        end += part.shape[1]
        given = {"attention_mask": mask[:, :end], "position_ids": at, "past_key_values": past}
        made.append(model(part, use_cache=True, **given).logits)
    return torch.cat(made, dim=1) * mask[..., None]


@torch.no_grad()
def generated(model: PreTrainedModel, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    given = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **given)


def follow(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Let every batch take one way."""
    monkeypatch.setattr(sites, "way", lambda *_: way)


@pytest.mark.parametrize(("family", "way"), FAMILIES)
def test_equals_the_reference(family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch, way)
    model, rows = float_model(family), 3
    looped = []
    ours = loop.decode
    monkeypatch.setattr(loop, "decode", lambda *given: (looped.append(1), ours(*given))[1])
    longer, mask = ragged(rows)
    new = tokens(rows, 7, seed=9).to(DEVICE)
    ids, seen = torch.cat([longer, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
    for method in methods(family, model):
        with dipnet.sparsify(model, method, backend="reference"):
            wanted, kept = decoded(model, ids, seen), dipnet.usage(model).density()
            dipnet.usage(model).reset()
            text, kept_of_text = generated(model, longer, mask), dipnet.usage(model).density()
        with dipnet.sparsify(model, method, backend="gpu", kept_inputs=5):
            torch.testing.assert_close(decoded(model, ids, seen), wanted, **CLOSE)
            assert dipnet.usage(model).density() == kept
            dipnet.usage(model).reset()
            looped.clear()
            assert torch.equal(generated(model, longer, mask), text)
            assert bool(looped) == (family in LOOPED)
            assert dipnet.usage(model).density() == kept_of_text


@pytest.mark.parametrize("rows", [1, 2, 5, 7, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_number_of_rows(rows: int, family: str) -> None:
    """By the ways that the rule takes; one more than are served runs the reference."""
    model, (ids, mask) = float_model(family), ragged(rows)
    method = dejavu(family) if family == "opt" else dipnet.DIP(0.4, attention_density=0.5)
    made = []
    for backend in ("reference", "gpu"):
        with dipnet.sparsify(model, method, backend=backend):
            made.append((generated(model, ids, mask), dipnet.usage(model).density()))
    assert torch.equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]


def test_batches_in_turn() -> None:
    """What one batch leaves behind is nothing to the next, of another size."""
    model = float_model("opt")
    with dipnet.sparsify(model, dejavu("opt"), backend="reference"):
        wanted = [generated(model, *ragged(rows)) for rows in (3, 1, 4)]
    with dipnet.sparsify(model, dejavu("opt"), backend="gpu", kept_inputs=4):
        for rows, text in zip((3, 1, 4), wanted, strict=True):
            assert torch.equal(generated(model, *ragged(rows)), text)


@pytest.mark.parametrize(("density", "read"), [(0.5, "whole"), (0.05, "union")])
def test_heads_are_skipped_where_that_reads_less(
    density: float, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that keeps nearly all heads together computes all of them, and completes nothing."""
    sized = sites.way
    monkeypatch.setattr(
        sites, "way", lambda n, d, units, _, *among: sized(n, d, units, 4e8, *among)
    )
    model, (ids, mask), method = float_model("opt"), ragged(4), dejavu("opt", head_density=density)
    with dipnet.sparsify(model, method, backend="reference"):
        wanted, kept = generated(model, ids, mask), dipnet.usage(model).density()
    with dipnet.sparsify(model, method, backend="gpu"):
        assert torch.equal(generated(model, ids, mask), wanted)
        assert dipnet.usage(model).density() == kept
        replay = getattr(model, ATTACHED).decoding._replay
    skipped = {layer.skipped is not None for layer in replay.step.layers}
    assert skipped == {read == "union"}


@pytest.mark.parametrize("drawn", [False, True])
def test_texts_end_one_after_another(drawn: bool) -> None:
    """A text that has ended goes on with padding until the last one ends."""
    model, (ids, mask) = float_model("llama"), ragged(4)
    method = thresholds(dipnet.TEAL(0.6), model)
    options: dict[str, Any] = {"do_sample": drawn, "max_new_tokens": 16}
    made = []
    for backend in ("reference", "gpu"):
        with dipnet.sparsify(model, method, backend=backend):
            torch.manual_seed(3)
            whole = generated(model, ids, mask, **options)[:, PROMPT:]
            ends = list({int(whole[0, 2]), int(whole[1, 5]), int(whole[2, 3]), int(whole[3, 8])})
            dipnet.usage(model).reset()
            torch.manual_seed(3)
            text = generated(model, ids, mask, eos_token_id=ends, **options)
            made.append((text, dipnet.usage(model).density()))
    assert made[0][0].shape[1] < PROMPT + 16
    assert torch.equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]


@pytest.mark.parametrize("hole", [(0, PROMPT - 1), (1, 4)])
def test_padding_elsewhere_runs_hugging_faces_loop(hole: tuple[int, int]) -> None:
    model, (ids, mask) = float_model("llama"), ragged(2)
    mask[hole] = 0
    made = []
    for backend in ("reference", "gpu"):
        with dipnet.sparsify(model, dipnet.DIP(0.5), backend=backend):
            made.append(generated(model, ids, mask))
    assert torch.equal(*made)


def test_several_texts_of_one_prompt() -> None:
    model, prompt = float_model("llama"), tokens(1, 5).to(DEVICE)
    made = []
    for backend in ("reference", "gpu"):
        with dipnet.sparsify(model, dipnet.DIP(0.5), backend=backend):
            torch.manual_seed(5)
            options = {"do_sample": True, "num_return_sequences": 3}
            made.append(generated(model, prompt, torch.ones_like(prompt), **options))
    assert torch.equal(*made)


def test_a_token_of_padding_is_not_counted() -> None:
    """A call of Hugging Face's whose token is none in one row."""
    model, rows = float_model("llama"), 2
    ids, mask = tokens(rows, 8).to(DEVICE), torch.ones(rows, 8, dtype=torch.long, device=DEVICE)
    mask[1, 6:] = 0
    made = []
    for backend in ("reference", "gpu"):
        with dipnet.sparsify(model, thresholds(dipnet.TEAL(0.6), model), backend=backend):
            decoded(model, ids, mask)
            made.append(dipnet.usage(model).density())
    assert made[0] == made[1]


def test_counts_go_on_after_a_text_that_ended() -> None:
    """The loop counts nothing of what it computes behind an end; a call after it is counted."""
    model, (ids, mask) = float_model("llama"), ragged(1)
    method = thresholds(dipnet.TEAL(0.6), model)
    made = []
    for backend in ("reference", "gpu"):
        with dipnet.sparsify(model, method, backend=backend):
            end = int(generated(model, ids, mask)[0, PROMPT + 1])
            generated(model, ids, mask, eos_token_id=end)
            dipnet.usage(model).reset()
            decoded(model, tokens(1, 9).to(DEVICE), torch.ones(1, 9).long().to(DEVICE))
            made.append(dipnet.usage(model).density())
    assert made[0] == made[1]
