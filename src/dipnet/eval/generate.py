"""Generate text with Hugging Face's ``generate()``, streaming it, and measure the time.

Knows no method: whatever is attached to the model runs.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

from dipnet.errors import InputError
from dipnet.models.load import LoadedModel
from dipnet.streaming.stats import process_bytes

Write = Callable[[str], object]


@dataclass(frozen=True)
class Generation:
    """The text made after a prompt, and the time it took.

    ``prompt_seconds`` end with the first new token; ``decode_seconds`` are those of the others,
    ``token_seconds`` each one's.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    decode_seconds: float
    ended: bool
    token_seconds: tuple[float, ...] = ()

    @property
    def tokens_per_second(self) -> float | None:
        """Decoded tokens per second, apart from the prompt; None with a single new token."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at ``temperature`` 0, else drawn."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be in (0, 1], got {self.top_p}: 1 keeps every token")

    def options(self) -> dict[str, Any]:
        """The arguments of ``generate()``."""
        drawn = self.temperature > 0
        return {
            "do_sample": drawn,
            "temperature": self.temperature if drawn else 1.0,
            "top_p": self.top_p if drawn else 1.0,
            "top_k": 0 if drawn else 50,
        }


def encode_prompt(loaded: LoadedModel, prompt: str, *, chat: bool = False) -> Tensor:
    """The prompt's (1, n) tokens on the model's device; see `prompt_tokens`."""
    tokens = prompt_tokens(loaded.name, loaded.tokenizer, loaded.context, prompt, chat=chat)
    return tokens.to(loaded.model.device)


def prompt_tokens(
    name: str, tokenizer: PreTrainedTokenizerBase, context: int, prompt: str, *, chat: bool = False
) -> Tensor:
    """The prompt's (1, n) tokens as the tokenizer makes them, in its chat template on request.

    ``name`` and ``context`` are the model's. Raises InputError when the prompt is empty, leaves no
    room in the context, or there is no chat template.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty: give some text with --prompt or --prompt-file")
    if chat and not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {name!r} has no chat template: leave out --chat")
    if chat:
        message = [{"role": "user", "content": prompt}]
        text = str(
            tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        )
    else:
        text = prompt
    encoded = tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]
    if len(encoded) >= context:
        raise InputError(
            f"the prompt has {len(encoded)} tokens, and the context of {name!r} is "
            f"{context}: shorten the prompt to {context - 1} tokens or fewer"
        )
    return torch.tensor([encoded])


def generate(
    loaded: LoadedModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    write: Write | None = None,
    decoding: Callable[[], object] | None = None,
) -> Generation:
    """Continue (1, n) ``prompt`` by at most ``max_new_tokens``, or to the end of the context.

    ``write`` gets the text piece by piece as it is made, and all of it that there is when an error
    ends it. ``decoding`` is called once, when the prompt has given the first token. Raises
    InputError when the model's logits are not finite.
    """
    sampling = sampling or Sampling()
    room = loaded.context - prompt.shape[1]
    stream, finite = _Stream(loaded.tokenizer, write, decoding), _Finite()
    set_seed(sampling.seed)
    start = time.perf_counter()
    with torch.no_grad(), _only_asked(loaded.model), _flushed(stream):
        output = loaded.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=min(max_new_tokens, room),
            logits_processor=LogitsProcessorList([finite]),
            streamer=stream,
            pad_token_id=_pad_token(loaded),
            **sampling.options(),
        )
        finite.check()
    new = output[0, prompt.shape[1] :]
    return Generation(
        text=stream.text,
        prompt_tokens=prompt.shape[1],
        new_tokens=len(new),
        prompt_seconds=stream.times[0] - start,
        decode_seconds=stream.times[-1] - stream.times[0],
        ended=int(new[-1]) in _end_tokens(loaded),
        token_seconds=tuple(after - before for before, after in pairwise(stream.times)),
    )


@contextmanager
def _only_asked(model: PreTrainedModel) -> Iterator[None]:
    """Keep a checkpoint's own generation settings (penalties, beams) out: only the end of text."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _flushed(stream: _Stream) -> Iterator[None]:
    """Pass on the word that is held back when an error ends the text."""
    try:
        yield
    except BaseException:
        stream.end()
        raise


def peak_memory(device: torch.device) -> int:
    """The most memory in bytes that was held so far: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux lets ru_maxrss begin with what the parent held when it started this process.
    held = process_bytes("VmHWM")
    if held:
        return held
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Finite(LogitsProcessor):
    """Stops at logits that say nothing: NaN, infinite, or all of them minus infinity.

    On a GPU one token late, so that the host does not wait for the device.
    """

    def __init__(self) -> None:
        self._finite: Tensor | None = None
        self._tokens = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.check()
        self._finite = torch.isfinite(scores.max(dim=-1).values).all()
        self._tokens = input_ids.shape[1]
        if scores.device.type == "cpu":
            self.check()
        return scores

    def check(self) -> None:
        """Raise InputError when the logits that came last are not finite."""
        if self._finite is not None and not self._finite:
            raise InputError(
                f"the model's logits are not finite after token {self._tokens}: NaN or "
                "overflow in its activations; try another dtype (--dtype float32)"
            )


class _Stream(TextStreamer):
    """Passes text on in whole words, and notes when each token came."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Write | None,
        decoding: Callable[[], object] | None,
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.decoding = decoding
        self.text = ""
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt's tokens, then each new one."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            if len(self.times) == 1 and self.decoding:
                self.decoding()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take text that no later token will change."""
        self.text += text
        if self.write and text:
            self.write(text)


def _end_tokens(loaded: LoadedModel) -> set[int]:
    end = loaded.model.generation_config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def _pad_token(loaded: LoadedModel) -> int | None:
    """Some pad token, which a single sequence never uses: `generate` warns without one."""
    ends = _end_tokens(loaded)
    pad: int | None = loaded.tokenizer.pad_token_id
    return pad if pad is not None else min(ends, default=None)
