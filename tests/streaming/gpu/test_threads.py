"""Two of the caller's threads on one model: each text is what it is alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

import dipnet
from tests.streaming.conftest import Stores
from tests.streaming.gpu.placed import DEVICE, place, placed

PROMPTS = [torch.tensor([row], device=DEVICE) for row in ([3, 9, 4], [7, 5, 11, 2, 8])]


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns many times a token."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 64}], ids=["ours", "theirs"])
def test_two_threads_on_one_model(stores: Stores, options: dict[str, Any]) -> None:
    """With plain masks what a cache holds changes no text."""
    model = place(stores("llama", "bf16"), dipnet.DIP(0.5), 0.4, prefill="dense")
    given = {"max_new_tokens": 12, "do_sample": False, **options}
    alone = [model.generate(prompt, **given) for prompt in PROMPTS]
    dipnet.usage(model).reset()
    begin, found = Barrier(len(PROMPTS)), dict[int, Tensor]()

    def write(number: int) -> None:
        begin.wait()
        found[number] = model.generate(PROMPTS[number], **given)

    threads = [Thread(target=write, args=(number,), daemon=True) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == [0, 1]
    assert all(torch.equal(found[number], text) for number, text in enumerate(alone))
    assert placed(model).usage.decoded() == 4 * 11
