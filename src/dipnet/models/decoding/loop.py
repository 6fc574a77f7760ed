"""Our decode loop, behind Hugging Face's ``generate()``.

``generate()`` prepares everything; where one sequence is drawn or decoded greedily, the loop here
takes the place of its own: a graph's replay a token, and the host one token behind the device, so
that neither waits for the other. Anything else is left to Hugging Face, on the same kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
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

OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
CRITERIA = (MaxLengthCriteria, EosTokenCriteria)


def why_not(
    input_ids: Tensor,
    stopping: StoppingCriteriaList,
    config: GenerationConfig,
    options: Mapping[str, Any],
) -> str | None:
    """Why a call of ``generate()`` is not for this loop, as the end of a sentence."""
    mask, past = options.get("attention_mask"), options.get("past_key_values")
    if len(input_ids) != 1:
        return "decodes one sequence"
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
    if mask is not None and not bool(mask.all()):
        return "knows no padding"
    return None


def decode(
    model: Any,
    replay: Replay,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    stopping: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any = None,
) -> Tensor:
    """Continue (1, n) ``input_ids`` to the end of the text or the longest length: (1, m)."""
    length, longest = input_ids.shape[1], int(stopping.max_length)
    ids = input_ids.new_empty(1, longest)
    ids[:, :length] = input_ids
    past = replay.begin()
    logits = model(input_ids=input_ids, past_key_values=past, use_cache=True).logits[:, -1]
    replay.prompt_ended(length)
    ends = End(stopping, input_ids.device)
    ended = False
    while length < longest and not ended:
        scores = processors(ids[:, :length], logits.to(copy=True, dtype=torch.float32))
        token = _chosen(scores, drawn=bool(config.do_sample))
        ids[:, length] = token
        ends.send(token)
        length += 1
        if length < longest:  # before it is known whether the text has ended
            logits = replay.run(token, ends.goes_on)
        value = ends.receive()
        ended = value in ends.values
        if streamer is not None:
            streamer.put(torch.tensor([value]))
    if streamer is not None:
        streamer.end()
    return ids[:, :length]


class End:
    """The tokens that end a text, and what the host is told of each token.

    ``goes_on`` (1,) is 0 on the device when the token sent last ends the text.
    """

    def __init__(self, stopping: StoppingCriteriaList, device: torch.device) -> None:
        ends = [each.eos_token_id.flatten() for each in stopping if type(each) is EosTokenCriteria]
        self._ends = torch.cat(ends).to(device) if ends else None
        self.values = set() if self._ends is None else set(self._ends.tolist())
        self.goes_on: Tensor | None = None
        self._host = torch.empty(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def send(self, token: Tensor) -> None:
        """Begin to tell the host a (1,) token."""
        self._host.copy_(token, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if self._ends is not None:
            self.goes_on = (token != self._ends).all(dim=0, keepdim=True)

    def receive(self) -> int:
        """The token that was sent last."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._host)


def _chosen(scores: Tensor, drawn: bool) -> Tensor:
    """The next token, as Hugging Face chooses it: (1, vocabulary) scores -> (1,)."""
    if drawn:
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
    return scores.argmax(dim=-1)
