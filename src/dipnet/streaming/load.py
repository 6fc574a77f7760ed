"""`dipnet.load`: a Hugging Face model whose weights stay in a store.

The model is built without its weights; its linear layers and its embedding are replaced, and what
is left (norms, biases) is filled in. So the family's own code runs, `generate()` and all.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from dipnet.cache import check_policy
from dipnet.errors import InputError
from dipnet.methods.base import Method
from dipnet.methods.dense import Dense
from dipnet.models.families import Decoder, context_length
from dipnet.models.tokens import Prefill
from dipnet.pack.plan import Block
from dipnet.sim.sizes import Split
from dipnet.store.check import check_rest
from dipnet.store.geometry import Weights
from dipnet.store.index import REST_NAME, Index, read_index
from dipnet.streaming.attach import Streamed, streamed
from dipnet.streaming.budget import Needs, divide, parse_size, pinned_bytes
from dipnet.streaming.embedding import row_embedding
from dipnet.streaming.engine import Engine, Reader, frames_size
from dipnet.streaming.filling import empty_model, fill
from dipnet.streaming.gpu.load import Bounds, check_gpu, check_options, on_device
from dipnet.streaming.gpu.resident import resident
from dipnet.streaming.keys import key_numbers, reserve_keys
from dipnet.streaming.linear import TOKENS
from dipnet.streaming.methods import densities, fitted_method, unit_for
from dipnet.streaming.packed import Progress, store_of
from dipnet.streaming.plan import Plan, Settings, open_plan
from dipnet.streaming.stats import Stats, process_bytes

DEFAULT_CONTEXT = 1024
"""Tokens of the longest sequence that memory is kept for, unless the caller says more."""
DEFAULT_POLICY = "lfu"


def load(
    path: str | Path,
    method: Method | None = None,
    *,
    plan: Plan | str | Path | None = None,
    memory: str | int | None = None,
    cache: str | int | None = None,
    context: int | None = None,
    policy: str | None = None,
    cache_split: Split | None = None,
    prefill: Prefill = "dense",
    look_ahead: bool | None = None,
    weights: Weights | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    reader: Reader | None = None,
) -> PreTrainedModel:
    """A causal LM that decodes with ``method`` (None: dense) from the store at ``path``.

    With ``weights`` (int4, int8 or bf16) ``path`` may also be a checkpoint, a hub id or a bundled
    model: it is packed once, into ~/.cache/dipnet or $DIPNET_CACHE, and runs from there, in columns
    or whole neurons as the method wants it; ``progress`` is called with the bytes written so far
    and in all.

    ``memory`` ("4GiB" or bytes) bounds the whole process: what is not taken by the interpreter,
    by the weights that are always in memory (attention, head), by keys and values for ``context``
    tokens and by buffers becomes the caches of the MLP's records. ``cache`` sets the size of those
    caches instead, with no bound on the rest; with neither, everything is in memory. ``policy`` is
    what a cache evicts: "lfu" (the default) or "lru"; ``cache_split`` says whether the caches share
    by what a token "wanted" of each (the default) or "even". ``prefill`` is as in `sparsify`.
    ``look_ahead`` reads records ahead on a guess, unless it is False; results are the same without
    it. ``reader`` is for tests and measurements.

    With ``device`` "cuda" the model decodes on that GPU, in bfloat16. With neither bound all
    records are in its memory, and the model is one that `sparsify` made. Else they are in the
    host's, and in the GPU's are the weights that are always needed and the caches; ``memory``, a
    plan's too, then bounds what PyTorch takes of the GPU's memory for the model. Nothing is read
    ahead there.

    A ``plan``, or the file of one that `dipnet plan` wrote, brings the method, the budget, the
    policy and the split; a checkpoint is packed as it says.

    Raises InputError when the store is damaged, the method cannot run on its records, the budget
    is too small (the message says which works), a plan is for another model or contradicted by
    another argument, or an argument says nothing to a GPU; `StoreError`, an InputError, when a
    record cannot be read later.
    """
    asked = Settings(method, memory, cache, context, policy, cache_split, weights)
    planned = None if plan is None else plan if isinstance(plan, Plan) else open_plan(plan)
    how = asked if planned is None else planned.settings(asked)
    check_policy(how.policy or DEFAULT_POLICY)
    gpu = None if device == "cpu" else check_gpu(device)
    if how.memory is not None and how.cache is not None:
        raise InputError("give either memory (of the whole process) or cache (of the records)")
    sizes = {"memory": how.memory, "cache": how.cache}
    bounds = {name: parse_size(size) for name, size in sizes.items() if size is not None}
    if gpu is not None:
        of_caches = (None, None) if planned else (policy, cache_split)  # a plan says both
        check_options(look_ahead, reader, *of_caches, bool(bounds))
    block: Block = planned.block if planned else "auto"
    folder = store_of(path, how.weights, progress, block, unit_for(how.method))
    index = read_index(folder)
    if planned is not None:
        planned.check_store(index, path)
    check_rest(folder, index)
    if gpu is not None and not bounds:
        _check_context(how.context, index.context)
        return resident(folder, index, how.method, prefill, gpu)
    model, scales = _skeleton(folder)
    decoder = Decoder(model)
    chosen = fitted_method(how.method or Dense(), folder, index, decoder.spec)
    reader = reader or Reader()
    budget = bounds.get("cache")
    tokens = _context(model, how.context)
    if gpu is not None:
        held = Bounds(
            gpu,
            bounds.get("memory"),
            budget,
            tokens,
            how.policy or DEFAULT_POLICY,
            how.cache_split or "wanted",
            planned=planned is not None,
        )
        return on_device(folder, index, scales, decoder, chosen, prefill, held)
    if "memory" in bounds:
        budget = needs(index, model, reader, tokens).left(bounds["memory"])
    shares = densities(chosen, index, decoder.spec)
    slots = divide(index, budget, shares, how.cache_split or "wanted")
    engine = Engine(folder, index, scales, slots, how.policy or DEFAULT_POLICY, reader)
    attached = Streamed(decoder, engine, chosen, prefill, look_ahead=look_ahead is not False)
    attached.attach()
    reserve_keys(model.get_decoder(), tokens, strict="memory" in bounds)
    for group in index.groups:
        if slots[group.layer, group.name] == group.units:
            engine.hold(group.key)
    attached.recorder.reset()
    return model


def stats(model: PreTrainedModel) -> Stats:
    """What a streamed model did since `reset_stats`, or since it was loaded.

    Raises InputError when the model was not made by `load`.
    """
    return streamed(model).recorder.stats()


def reset_stats(model: PreTrainedModel) -> None:
    """Count anew from here: usage and statistics; the caches stay warm."""
    attached = streamed(model)
    attached.recorder.reset()
    attached.usage.reset()


def needs(index: Index, model: PreTrainedModel, reader: Reader, tokens: int) -> Needs:
    """The memory that a store's model takes beside its caches, for sequences of ``tokens``."""
    return Needs(
        process=process_bytes(),
        peak=process_bytes("VmHWM"),
        pinned=pinned_bytes(index),
        frames=frames_size(index, reader),
        keys=4 * key_numbers(model) * tokens,
        work=_work(index, tokens),
    )


def _work(index: Index, tokens: int) -> int:
    """Bytes of sums, activations and bookkeeping, with a prompt of ``tokens``.

    A piece of a prompt has sums of every class; the whole of it passes the MLP at once: gate, up,
    their activation and product, and some vectors of the model's width. A unit costs about 70
    bytes of tables, a channel 4 of its scale's copy.
    """
    piece = max(TOKENS * (25 * g.outputs + 12 * g.rows + 16 * g.channels) for g in index.groups)
    tables = sum(70 * group.units + 4 * group.units * group.columns for group in index.groups)
    mlp = index.neurons
    gated = any("gate" in group.matrices for group in index.first_layer)
    made = mlp.channels * (2 if gated else 1)
    whole = 0
    if index.unit == "neuron":
        whole = mlp.units * mlp.stride + tokens * (2 * mlp.units + 8 * mlp.outputs)
    return piece + 4 * tokens * (2 * made + 8 * mlp.rows) + tables + whole


def measured_needs(path: str | Path, context: int | None = None) -> Needs:
    """What the store at ``path`` takes in this process, for sequences of ``context`` tokens.

    Raises InputError when the store is damaged.
    """
    folder = Path(path)
    index = read_index(folder)
    model, _scales = _skeleton(folder)
    return needs(index, model, Reader(), _context(model, context))


def _context(model: PreTrainedModel, asked: int | None) -> int:
    longest = context_length(model)
    _check_context(asked, longest)
    return asked or min(longest, DEFAULT_CONTEXT)


def _check_context(asked: int | None, longest: int) -> None:
    """Raise InputError for a context that is no number of a model's tokens."""
    if asked is not None and not (isinstance(asked, int) and 1 <= asked <= longest):
        raise InputError(f"context must be between 1 and the model's {longest}, got {asked!r}")


def _skeleton(folder: Path) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model with everything but its linear layers filled in, and the records' scales."""
    model = empty_model(folder, torch.float32)
    file = folder / REST_NAME
    with safe_open(file, framework="pt") as rest:
        names = set(rest.keys())
        scales = {name: rest.get_tensor(name) for name in names if name.startswith("scale.")}
        embedding = _name_of(model, model.get_input_embeddings())
        model.set_submodule(embedding, row_embedding(file, f"{embedding}.weight", model))
        for name in names - scales.keys() - {f"{embedding}.weight"}:
            fill(model, name, rest.get_tensor(name).float())
    return model, scales


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
