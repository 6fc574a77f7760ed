"""Keys and values in memory that is set aside once.

transformers' own cache grows by concatenation: every token copies all keys and values, and what is
freed in between is not all used again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from dipnet.errors import InputError


class ReservedLayer(DynamicLayer):
    """A layer's keys and values, appended in place while they fit into ``reserve`` tokens.

    What does not fit is moved to twice the room. Memory that no token has reached is not in use.
    """

    def __init__(self, reserve: int, *_: Any) -> None:
        super().__init__()
        self.reserve = reserve
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Append (batch, heads, tokens, size) keys and values; returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values  # type: ignore[has-type]
        self.keys = self._appended("keys", keys, key_states)
        self.values = self._appended("values", values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        length = held.shape[-2] if held.numel() else 0
        end = length + new.shape[-2]
        room = self._rooms.get(name)
        if room is None or not _continues(room, held, new, length, end):
            batch, heads, _, size = new.shape
            tokens = max(self.reserve // batch, 2 * length if length else 0, end)
            room = self._rooms[name] = new.new_empty(batch, heads, tokens, size)
            if length:
                room[:, :, :length] = held
        room[:, :, length:end] = new
        return room[:, :, :end]


def _continues(room: Tensor, held: Tensor, new: Tensor, length: int, end: int) -> bool:
    """Whether ``held`` is the beginning of ``room``, and what follows fits."""
    fits = end <= room.shape[-2] and room.shape[:2] == new.shape[:2]
    return fits and (not length or held.data_ptr() == room.data_ptr())


def reserve_keys(decoder: nn.Module, reserve: int, *, strict: bool) -> None:
    """Let the caches that ``decoder`` is called with keep room for ``reserve`` tokens.

    ``strict``: a call that needs more, over all sequences of its batch, raises InputError.
    """
    decoder.register_forward_pre_hook(partial(_reserve, reserve, strict), with_kwargs=True)


def _reserve(
    reserve: int, strict: bool, _module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> None:
    cache = kwargs.get("past_key_values")
    if strict and kwargs.get("use_cache") is not False:
        _check_call(reserve, cache, args, kwargs)
    if not isinstance(cache, DynamicCache) or cache.get_seq_length():
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = partial(ReservedLayer, reserve)
    for at, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[at] = ReservedLayer(reserve)


def _check_call(reserve: int, cache: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    inputs = kwargs.get("input_ids", args[0] if args else None)
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:  # the decoder itself says what is missing
        return
    batch, new = inputs.shape[:2]
    check_room(reserve, batch, new + (cache.get_seq_length() if cache is not None else 0))


def check_room(reserve: int, batch: int, length: int) -> None:
    """Raise InputError when ``batch`` sequences of ``length`` tokens need more than ``reserve``."""
    if batch * length > reserve:
        raise InputError(
            f"{batch} x {length} tokens need more memory for keys and values than the {reserve} "
            "tokens that the budget was divided for: ask for fewer tokens, or load the model with "
            "a larger context"
        )


def key_numbers(model: PreTrainedModel) -> int:
    """Numbers of a token's keys and values, in all layers."""
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size)
