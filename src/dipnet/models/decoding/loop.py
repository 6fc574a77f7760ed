"""Our decode loop, behind Hugging Face's ``generate()``.

``generate()`` prepares everything; where a few sequences are drawn or decoded greedily, the loop
here takes the place of its own: a graph's replay a token, and the host one token behind the device,
so that neither waits for the other. Anything else is left to Hugging Face, on the same kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from dipnet.models.decoding.graph import Replay
from dipnet.models.decoding.sharing import MOST_ROWS

OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
CRITERIA = (MaxLengthCriteria, EosTokenCriteria)


@dataclass(frozen=True)
class Call:
    """What ``generate()`` has made of its arguments; ``options`` are those of the model's call."""

    processors: LogitsProcessorList
    stopping: StoppingCriteriaList
    config: GenerationConfig
    options: Mapping[str, Any]


def why_not(
    input_ids: Tensor,
    stopping: StoppingCriteriaList,
    config: GenerationConfig,
    options: Mapping[str, Any],
) -> str | None:
    """Why a call of ``generate()`` is not for this loop, as the end of a sentence."""
    mask, past = options.get("attention_mask"), options.get("past_key_values")
    if not 1 <= len(input_ids) <= MOST_ROWS:
        return f"decodes up to {MOST_ROWS} sequences"
    if config.return_dict_in_generate or any(getattr(config, name, None) for name in OUTPUTS):
        return "returns tokens alone"
    if config.cache_implementation not in (None, "static", "dynamic") or not config.use_cache:
        return "has a static cache of its own"
    if getattr(config, "prefill_chunk_size", None) is not None:
        return "takes a prompt in one piece"
    if stopping.max_length is None or any(type(each) not in CRITERIA for each in stopping):
        return "stops at a length or a token"
    if options.get("inputs_embeds") is not None or options.get("synced_gpus"):
        return "reads tokens, on one device"
    if isinstance(past, Cache) and int(past.get_seq_length()) > 0:
        return "begins with an empty cache"
    if mask is not None and not _padded_in_front(mask, input_ids):
        return "reads prompts that are padded in front, if at all"
    if not _in_order(options.get("position_ids"), mask, input_ids):
        return "reads tokens at the positions that follow from the padding"
    return None


def _padded_in_front(mask: Tensor, input_ids: Tensor) -> bool:
    """Whether a mask says that each row is some padding and then its tokens, one at least."""
    if mask.shape != input_ids.shape:
        return False
    columns = torch.arange(mask.shape[1], device=mask.device)
    tokens = columns >= _padding(mask)[:, None]
    return bool((tokens == mask.bool()).all() & mask.bool()[:, -1].all())


def _padding(mask: Tensor) -> Tensor:
    """(batch, n) attention mask -> (batch,) int64 columns of padding."""
    return (~mask.bool()).sum(dim=1)


def _positions(mask: Tensor) -> Tensor:
    """(batch, n) attention mask -> (batch, n) int64 places of the tokens; 0 for padding."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _in_order(positions: Tensor | None, mask: Tensor | None, input_ids: Tensor) -> bool:
    """Whether given positions, if any, are those that tokens have by themselves."""
    if positions is None:
        return True
    if positions.shape[-1:] != input_ids.shape[-1:]:
        return False
    tokens = torch.ones_like(input_ids) if mask is None else mask
    return bool(((positions == _positions(tokens)) | (tokens == 0)).all())


def decode(model: Any, replay: Replay, input_ids: Tensor, call: Call) -> Tensor:
    """Continue (batch, n) ``input_ids`` to the end of the texts or the longest length: (batch, m).

    A text that has ended goes on with padding until all have.
    """
    stopping, streamer = call.stopping, call.options.get("streamer")
    length, longest = input_ids.shape[1], int(stopping.max_length)
    ids = input_ids.new_empty(len(input_ids), longest)
    ids[:, :length] = input_ids
    logits = _prompt(model, replay, input_ids, call.options)
    ends = Ends(call, len(ids), input_ids.device)
    while length < longest and not ends.ended:
        token = ends.send(_next(logits, ids[:, :length], call))
        ids[:, length] = token
        length += 1
        if length < longest:  # before it is known whether the texts have ended
            logits = replay.run(token, ends.goes_on)
        values = ends.receive()
        if streamer is not None:
            streamer.put(torch.tensor(values))
    if streamer is not None:
        streamer.end()
    return ids[:, :length]


def _prompt(model: Any, replay: Replay, input_ids: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The (batch, vocabulary) logits after the prompts."""
    given = {name: options[name] for name in ("logits_to_keep",) if name in options}
    mask, padding = options.get("attention_mask"), None
    if mask is not None and not bool(mask.all()):
        padding = _padding(mask)
        given |= {"attention_mask": mask, "position_ids": _positions(mask)}
    past = replay.begin()
    made = model(input_ids=input_ids, past_key_values=past, use_cache=True, **given)
    replay.prompt_ended(input_ids.shape[1], padding)
    logits: Tensor = made.logits[:, -1]
    return logits


class Ends:
    """The tokens that end a text, and what the host is told of each token.

    ``goes_on`` (1,) is False on the device when the tokens sent last end all texts, and ``ended``
    the same on the host, of the tokens received last.
    """

    def __init__(self, call: Call, rows: int, device: torch.device) -> None:
        stopping = [each for each in call.stopping if type(each) is EosTokenCriteria]
        ends = [each.eos_token_id.flatten() for each in stopping]
        self._ends = torch.cat(ends).to(device) if ends else None
        self._values = set() if self._ends is None else set(self._ends.tolist())
        padding = getattr(call.config, "_pad_token_tensor", None)
        self._padding = None if padding is None else padding.to(device)
        self._unfinished = torch.ones(rows, dtype=torch.bool, device=device)
        self._open = set(range(rows))
        self.goes_on: Tensor | None = None
        self._host = torch.empty(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    @property
    def ended(self) -> bool:
        """Whether all texts have ended."""
        return not self._open

    def send(self, token: Tensor) -> Tensor:
        """Begin to tell the host (rows,) tokens; those of texts that have ended are padding."""
        if self._ends is not None and self._padding is not None:
            token = torch.where(self._unfinished, token, self._padding)
        self._host.copy_(token, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if self._ends is not None:
            self._unfinished = self._unfinished & (token[:, None] != self._ends).all(dim=1)
            self.goes_on = self._unfinished.any(dim=0, keepdim=True)
        return token

    def receive(self) -> list[int]:
        """The tokens that were sent last."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[int] = self._host.tolist()
        self._open -= {row for row, value in enumerate(values) if value in self._values}
        return values


def _next(logits: Tensor, ids: Tensor, call: Call) -> Tensor:
    """The next tokens, as Hugging Face chooses them: (batch, vocabulary) logits -> (batch,)."""
    if not call.processors and not call.config.do_sample:
        return _highest(logits)
    scores = call.processors(ids, logits.to(copy=True, dtype=torch.float32))
    if call.config.do_sample:
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
    return _highest(scores)


def _highest(scores: Tensor) -> Tensor:
    """`argmax` of each row, in parts where its length allows: (batch, n) -> (batch,).

    One row of 128256 takes PyTorch 28 us on an H200, where one thread block has it, and in parts
    about 20.
    """
    parts = math.gcd(scores.shape[1], 256)
    if parts == 1:
        return scores.argmax(dim=-1)
    highest, places = scores.unflatten(1, (parts, -1)).max(dim=-1)
    part = highest.argmax(dim=-1, keepdim=True)
    return (part * (scores.shape[1] // parts) + places.gather(1, part)).squeeze(1)
