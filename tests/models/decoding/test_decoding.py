"""Decoding by the kernels is decoding by the reference: the same tokens, logits and counts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import dipnet
from dipnet import BackendError
from dipnet.models import backends
from dipnet.models.decoding import loop
from dipnet.models.decoding.stacked import Stacked
from tests.matrix import allocated, scored
from tests.models.skipping.decoding import Turns, decode, dejavu, own, tokens

CLOSE = {"rtol": 1e-3, "atol": 1e-3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOOPED = ("llama", "qwen2", "qwen3", "phi3", "opt")
"""Families that our own loop decodes; the tiny Mistral's window is too narrow for it."""
OTHERS = ("mistral", "gemma2", "gemma3", "opt-350m")


def thresholds(method: Any, model: PreTrainedModel) -> Any:
    return dipnet.calibrate(model, method, tokens(2, 40).to(DEVICE))


def methods(family: str, model: PreTrainedModel) -> list[Any]:
    """What can be decoded on a GPU: all of it for two families, of every kind for the others."""
    found: list[Any] = [dipnet.DIP(0.5, attention_density=0.5, hidden_block=4), dejavu(family)]
    if not family.startswith("opt"):
        found.append(dipnet.GatePruning(0.6))
    if family not in ("llama", "opt"):
        return found
    found += [dipnet.Dense(), dipnet.DIP(0.5), dipnet.WINA(0.5, attention_density=0.6)]
    found += [dipnet.GLUPruning(0.8), dejavu(family, head_density=None)]
    found.append(thresholds(dipnet.TEAL(0.6), model))
    if family == "llama":
        found += [dipnet.UpPruning(0.6), thresholds(dipnet.CATS(0.6), model)]
        spec = dipnet.describe(model)
        found += [allocated(spec, attention=True), scored(spec)]
        weighed = dipnet.DIPThreshold(0.5, scores=scored(spec).scores)
        found += [thresholds(weighed, model)]
    return found


def float_model(family: str) -> PreTrainedModel:
    return own(family).float().to(DEVICE)


@torch.no_grad()
def generated(model: PreTrainedModel, prompt: Tensor, **options: Any) -> Tensor:
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=14, **options)


@pytest.mark.parametrize("family", [*LOOPED, *OTHERS])
def test_equals_the_reference(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = float_model(family), tokens(1, 16).to(DEVICE)
    looped = []
    ours = loop.decode
    monkeypatch.setattr(loop, "decode", lambda *given: (looped.append(1), ours(*given))[1])
    for method in methods(family, model):
        with dipnet.sparsify(model, method, backend="reference"):
            wanted = decode(model, ids, prompt=3)
            kept = dipnet.usage(model).density()
            dipnet.usage(model).reset()
            text = generated(model, ids[:, :5], do_sample=False)
            kept_of_text = dipnet.usage(model).density()
        with dipnet.sparsify(model, method, backend="gpu", kept_inputs=5):
            torch.testing.assert_close(decode(model, ids, prompt=3), wanted, **CLOSE)
            assert dipnet.usage(model).density() == kept
            dipnet.usage(model).reset()
            looped.clear()
            assert torch.equal(generated(model, ids[:, :5], do_sample=False), text)
            assert bool(looped) == (family in LOOPED)
            assert dipnet.usage(model).density() == kept_of_text


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_drawn_as_hugging_face_draws(family: str) -> None:
    model, prompt = float_model(family), tokens(1, 6).to(DEVICE)
    options = {"do_sample": True, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.2}
    made = []
    for backend in ("reference", "gpu"):
        with dipnet.sparsify(model, dipnet.DIP(0.5), backend=backend):
            torch.manual_seed(7)
            made.append(generated(model, prompt, **options))
    assert torch.equal(*made)


@pytest.mark.parametrize("n", [1, 7, 96, 1024, 50257, 50272])
def test_highest_of_a_row(n: int) -> None:
    """The first of equal ones, and NaN before all, as `argmax` has it."""
    scores = torch.randint(50, (3, n)).float().to(DEVICE)
    assert torch.equal(loop._highest(scores), scores.argmax(dim=-1))
    scores[1, n // 2], scores[2] = float("nan"), float("-inf")
    assert torch.equal(loop._highest(scores), scores.argmax(dim=-1))


def test_ends_where_the_text_ends() -> None:
    """The token after the end is computed before the end is known, and is not counted."""
    model, prompt = float_model("llama"), tokens(1, 6).to(DEVICE)
    method = thresholds(dipnet.TEAL(0.6), model)
    with dipnet.sparsify(model, method, backend="reference"):
        whole = generated(model, prompt, do_sample=False)[0, 6:].tolist()
        end = next(token for token in whole[3:] if token not in whole[:3])
        options = {"do_sample": False, "eos_token_id": [end, 60], "pad_token_id": 0}
        dipnet.usage(model).reset()
        wanted, kept = generated(model, prompt, **options), dipnet.usage(model).density()
    with dipnet.sparsify(model, method, backend="gpu"):
        assert torch.equal(generated(model, prompt, **options), wanted)
        assert dipnet.usage(model).density() == kept


class Seen:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streams() -> None:
    model, prompt, seen = float_model("llama"), tokens(1, 6).to(DEVICE), Seen()
    with dipnet.sparsify(model, dipnet.DIP(0.5), backend="gpu"):
        made = generated(model, prompt, do_sample=False, streamer=seen)
    assert seen.tokens == made[0].tolist()
    assert seen.ended


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 2},
        {"max_time": 100.0},
        {"position_ids": 3 * torch.arange(6, device=DEVICE)[None]},
    ],
)
def test_hugging_face_does_the_rest(options: dict[str, Any]) -> None:
    model, prompt = float_model("llama"), tokens(1, 6).to(DEVICE)
    made = []
    for backend in ("reference", "gpu"):
        with dipnet.sparsify(model, dipnet.DIP(0.5), backend=backend):
            given = generated(model, prompt, do_sample=False, **options)
            made.append(given if isinstance(given, Tensor) else given.sequences)
    assert torch.equal(*made)


@pytest.mark.parametrize("prefill", ["dense", "sparse", 9])
def test_prefill(prefill: Any) -> None:
    model, prompt = float_model("llama"), tokens(1, 6).to(DEVICE)
    made = []
    for backend in ("reference", "gpu"):
        with dipnet.sparsify(model, dipnet.DIP(0.5), backend=backend, prefill=prefill):
            made.append((generated(model, prompt, do_sample=False), dipnet.usage(model).density()))
    assert torch.equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_undone(family: str) -> None:
    model, ids = float_model(family), tokens(1, 8).to(DEVICE)
    before = {name: (id(p), p.stride(), p.clone()) for name, p in model.named_parameters()}
    attributes = [sorted(vars(module)) for module in model.modules()]
    for method in (dipnet.Dense(), dipnet.DIP(0.5, attention_density=0.5), dejavu(family)):
        with dipnet.sparsify(model, method, backend="gpu"):
            decode(model, ids)
            for name, values in model.state_dict().items():
                if name in before:
                    assert torch.equal(values, before[name][2])
        for name, parameter in model.named_parameters():
            assert (id(parameter), parameter.stride()) == before[name][:2]
            assert torch.equal(parameter, before[name][2])
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert [sorted(vars(module)) for module in model.modules()] == attributes


def test_weights_are_stored_once() -> None:
    model = float_model("llama")
    with dipnet.sparsify(model, dipnet.DIP(0.5, attention_density=0.5), backend="gpu"):
        storages = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
        }
        assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())


def test_a_copy_decodes_by_itself() -> None:
    model, prompt = float_model("llama"), tokens(1, 6).to(DEVICE)
    dipnet.sparsify(model, dipnet.DIP(0.5), backend="gpu")
    wanted = generated(model, prompt, do_sample=False)
    other = copy.deepcopy(model)
    dipnet.restore(model)
    assert torch.equal(generated(other, prompt, do_sample=False), wanted)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_no_graph_breaks(family: str, rows: int) -> None:
    """One graph, whole, for every token of Hugging Face's own loop on a static cache."""
    model, ids = float_model(family), tokens(rows, 12).to(DEVICE)
    methods = {"llama": dipnet.DIP(0.5, attention_density=0.5), "opt": dejavu("opt")}
    with torch.no_grad(), dipnet.sparsify(model, methods[family], backend="gpu"):
        made, counts = [], []
        for compiled in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            made.append(static(model, ids, compiled))
            counts.append(dipnet.usage(model).density())
            dipnet.usage(model).reset()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        torch.testing.assert_close(made[1], made[0], **CLOSE)
        assert counts[0] == counts[1]


def static(model: PreTrainedModel, ids: Tensor, compiled: bool) -> Tensor:
    """Logits of single tokens after a prompt of four; with a mask, as `generate` gives one."""
    cache = StaticCache(config=model.config, max_cache_len=16)
    mask = torch.ones(len(ids), 16, dtype=torch.long, device=DEVICE)
    made = [model(ids[:, :4], past_key_values=cache).logits]
    call = model.__call__
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    for i in range(4, ids.shape[1]):
        given = {"position_ids": torch.tensor([[i]], device=DEVICE), "attention_mask": mask}
        made.append(call(ids[:, i : i + 1], past_key_values=cache, **given).logits.clone())
    return torch.cat(made, dim=1)


# --- choice ---


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (dipnet.GLUOracle(0.5), "does not skip units of mlp.neuron that hidden decides"),
        (Turns(0.2, 0.125), "that position decides"),
    ],
)
def test_methods_that_are_not_served(method: Any, message: str) -> None:
    with pytest.raises(BackendError, match=message) as error:
        dipnet.sparsify(float_model("llama"), method, backend="gpu")
    assert "\n" not in str(error.value)


def test_caches_are_not_served() -> None:
    settings = dipnet.CacheSettings(share=0.5)
    with pytest.raises(BackendError, match="has no caches of units"):
        dipnet.sparsify(float_model("llama"), dipnet.DIP(0.5), backend="gpu", cache=settings)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_not_tensors", lambda *_: "needs a CUDA GPU, not cpu")
    with pytest.raises(BackendError, match="needs a CUDA GPU, not cpu; there are: auto, reference"):
        dipnet.sparsify(own("llama").float(), dipnet.DIP(0.5), backend="gpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dipnet.sparsify(own("llama").float(), dipnet.DIP(0.5))


def test_double_precision_is_refused() -> None:
    with pytest.raises(BackendError, match=r"takes float16, bfloat16 and float32, not torch.float"):
        dipnet.sparsify(own("llama").to(DEVICE), dipnet.DIP(0.5), backend="gpu")


@pytest.mark.parametrize("backend", ["auto", "gpu"])
def test_no_memory_for_another_order(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer's weights find no room: an error, or the reference; nothing is changed."""
    model, joined = float_model("llama"), Stacked._join

    def join(stacked: Stacked) -> Tensor:
        if any(module is model.model.layers[1].mlp.down_proj for module in stacked.modules):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return joined(stacked)

    monkeypatch.setattr(Stacked, "_join", join)
    monkeypatch.setattr(backends, "_best", lambda *_: "gpu")
    before = [(parameter.stride(), parameter.clone()) for parameter in model.parameters()]
    if backend == "gpu":
        with pytest.raises(
            BackendError, match="more of the GPU's memory while weights are put in its order"
        ) as error:
            dipnet.sparsify(model, dipnet.DIP(0.5), backend=backend)
        assert "\n" not in str(error.value)
    else:
        with pytest.warns(
            UserWarning, match="more of the GPU's memory while weights are put in its order"
        ):
            dipnet.sparsify(model, dipnet.DIP(0.5))
        decode(model, tokens(1, 4).to(DEVICE))
        assert dipnet.usage(model).density().tokens == 4
        dipnet.restore(model)
    for parameter, (stride, values) in zip(model.parameters(), before, strict=True):
        assert parameter.stride() == stride
        assert torch.equal(parameter, values)
