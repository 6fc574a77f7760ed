"""What needs a GPU: a token is one CUDA graph, inside a limit that PyTorch is held to."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dipnet
from dipnet.methods.base import Method
from dipnet.pack.packing import pack
from dipnet.store.geometry import WEIGHTS
from tests.checkpoints import save_llama
from tests.streaming.conftest import Stores
from tests.streaming.decoding import load
from tests.streaming.gpu.placed import DEVICE, place, placed
from tests.streaming.gpu.test_invariants import caches, engine_caches, generated

pytestmark = pytest.mark.cuda
AWARE = dipnet.DIP(0.5, cache_aware=0.2)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("method", [AWARE, dipnet.DIP(0.5), None], ids=["aware", "plain", "dense"])
def test_a_graph_does_what_its_step_does(stores: Stores, weights: str, method: Method) -> None:
    """Replayed or through Hugging Face's modules: the same text and the same caches."""
    store = stores("llama", weights)
    ours, theirs = (place(store, method, 0.4, prefill="dense") for _ in range(2))
    text = generated(ours)
    replay = placed(ours).decoding._replay
    assert replay is not None
    assert replay.graph is not None
    assert generated(theirs, prefill_chunk_size=64) == text
    assert caches(ours) == caches(theirs)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_the_cpus_engine_finds_the_same(stores: Stores, policy: str) -> None:
    store, prompt = stores("llama", "bf16"), torch.tensor([[3, 9, 4]])
    found = place(store, AWARE, 0.4, prefill="dense", policy=policy)
    engine = load(store, AWARE, share=0.4, prefill="dense", policy=policy)
    text = engine.generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    assert generated(found) == text
    assert caches(found) == engine_caches(engine)


def test_no_more_than_the_limit(tmp_path_factory: pytest.TempPathFactory) -> None:
    """PyTorch's allocator refuses what is beyond it; prompts of any length fit."""
    folder = tmp_path_factory.mktemp("wide")
    save_llama(folder / "model")  # its tokenizer
    shape = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=512, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    pack(str(folder / "model"), folder / "store", "bf16")
    with pytest.raises(dipnet.InputError, match="the smallest that works is") as caught:
        dipnet.load(folder / "store", AWARE, device="cuda", memory="1MiB")
    smallest = int(str(caught.value).split("works is ")[1].split(" MiB")[0]) << 20
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    memory = smallest + (24 << 20)  # of 96 MiB of records
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + memory) / total)
    try:
        model = dipnet.load(folder / "store", AWARE, device="cuda", memory=memory, context=512)
        for tokens in (3, 300):
            prompt = torch.randint(2, 256, (1, tokens), device=DEVICE)
            made = model.generate(prompt, max_new_tokens=20, do_sample=False)
            assert made.shape[1] == tokens + 20
        stats = dipnet.stats(model)
        assert stats.sites["mlp.in"].misses > 0
        with pytest.raises(dipnet.InputError, match="the budget was divided for"):
            model.generate(prompt, max_new_tokens=400)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_run(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`dipnet.load(..., device="cuda")` with a cache, in bfloat16."""
    model = dipnet.load(stores("qwen3", "int8"), AWARE, device="cuda", cache="20KB")
    assert model.dtype == torch.bfloat16
    assert len(generated(model)) == 15
    assert dipnet.stats(model).calls == 12
