"""What only a GPU can show: nobody waits for it, and weights are there once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet import InputError
from dipnet.models.decoding import loop
from dipnet.models.decoding.forecast import Choice, Forecast
from dipnet.models.decoding.graph import Replay
from dipnet.models.decoding.sites import SiteStep
from dipnet.models.decoding.token import TokenStep
from dipnet.streaming.gpu.records import pin
from tests.models.decoding.test_decoding import float_model, thresholds
from tests.models.skipping.decoding import dejavu, tokens

pytestmark = pytest.mark.cuda
SMALL = 0.02
"""Of the weights: what lists, counts and tables of rotations take."""


@pytest.fixture
def unwatched() -> Iterator[None]:
    """PyTorch raises no errors for synchronisation afterwards."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def watch_loop(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let synchronisation be an error from the first token after the prompt to the last."""
    run, ours, watched = Replay.run, loop.decode, []

    def watched_run(replay: Replay, *given: Any) -> Tensor:
        watched.append(1)
        torch.cuda.set_sync_debug_mode("error")
        return run(replay, *given)

    def decode(*given: Any) -> Tensor:
        made = ours(*given)
        torch.cuda.set_sync_debug_mode("default")
        return made

    monkeypatch.setattr(Replay, "run", watched_run)
    monkeypatch.setattr(loop, "decode", decode)
    return watched


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", ["dip", "teal", "dejavu"])
def test_nobody_waits_for_the_device(
    kind: str, rows: int, unwatched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = float_model("llama"), tokens(rows, 6).cuda()
    methods = {"dip": dipnet.DIP(0.5, attention_density=0.5), "dejavu": dejavu("llama")}
    method = methods[kind] if kind in methods else thresholds(dipnet.TEAL(0.6), model)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 60}
    with torch.no_grad(), dipnet.sparsify(model, method, backend="gpu"):
        options |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
        wanted = model.generate(prompt, **options)  # kernels are compiled, the graph captured
        watched = watch_loop(monkeypatch)
        assert torch.equal(model.generate(prompt, **options), wanted)
    assert watched


def test_memory_runs_out_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken capture hides why it broke; it is said all the same, and the next text is made."""
    model, prompt = float_model("llama"), tokens(2, 6).cuda()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    before, take = torch.cuda.current_stream(), Forecast.take

    def failing(forecast: Forecast, step: SiteStep) -> Choice:
        if torch.cuda.is_current_stream_capturing():  # the predictors' stream has not come back
            raise torch.OutOfMemoryError("CUDA out of memory")
        return take(forecast, step)

    with torch.no_grad(), dipnet.sparsify(model, dejavu("llama"), backend="gpu"):
        monkeypatch.setattr(Forecast, "take", failing)
        with pytest.raises(InputError, match="keys and values of 2 x 14 tokens take"):
            model.generate(prompt, **options)
        assert torch.cuda.current_stream() == before
        monkeypatch.undo()
        made = model.generate(prompt, **options)
    with torch.no_grad(), dipnet.sparsify(model, dejavu("llama"), backend="reference"):
        assert torch.equal(model.generate(prompt, **options), made)


class Garbage:
    """Of an engine that streams: pinned memory in a cycle, which only the collector frees."""

    def __init__(self, records: Tensor) -> None:
        self.itself = self
        self.records = records


def test_nothing_is_collected_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = float_model("llama"), tokens(1, 6).cuda()
    pinned, call = [pin(torch.empty(1 << 20, dtype=torch.uint8))], TokenStep.__call__
    freed: list[bool] = []

    def dropping(step: TokenStep) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            weakref.finalize(Garbage(pinned.pop()), freed.append, True)
            many: list[list[int]] = [[] for _ in range(100_000)]  # the collector would begin
            assert len(many) > len(freed) == 0
        return call(step)

    monkeypatch.setattr(TokenStep, "__call__", dropping)
    with torch.no_grad(), dipnet.sparsify(model, dipnet.DIP(0.5), backend="gpu"):
        model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert not pinned
    assert gc.isenabled()
    gc.collect()
    assert freed
    torch.cuda.synchronize()  # no error is left behind


def wide_model() -> PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def requested() -> int:
    """Bytes that tensors hold; what the allocator rounds them up to may be a megabyte more each."""
    gc.collect()
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


@pytest.mark.parametrize("attention", [None, 0.5])
def test_weights_are_in_memory_once(attention: float | None) -> None:
    model = wide_model()
    weights, before = sum(p.nbytes for p in model.parameters()), requested()
    dipnet.sparsify(model, dipnet.DIP(0.5, attention_density=attention), backend="gpu")
    assert requested() - before <= SMALL * weights
    dipnet.restore(model)
    assert requested() - before <= SMALL * weights


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_decode_like_the_reference(rows: int, dtype: torch.dtype) -> None:
    """Tensor cores and lists of the rows' own give the dense model's logits where all is kept."""
    model, ids = wide_model().to(dtype), tokens(rows, 4).cuda()
    with torch.no_grad():
        wanted = model(ids).logits[:, -1].float()
        for density in (1.0, 0.999):
            with dipnet.sparsify(model, dipnet.DIP(density), backend="gpu") as sparse:
                past = sparse(ids[:, :-1], use_cache=True).past_key_values
                made = sparse(ids[:, -1:], past_key_values=past).logits[:, -1].float()
            error = (made - wanted).norm() / wanted.norm()
            assert error < (0.02 if dtype == torch.float16 else 0.06)
