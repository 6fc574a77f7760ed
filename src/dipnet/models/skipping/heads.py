"""The attention projections of one layer, of kept heads only, and the keys and values they leave
out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dipnet.errors import BackendError
from dipnet.models.skipping import pending
from dipnet.models.skipping.base import BACKENDS, Deciding, Skip, Skipping
from dipnet.models.skipping.gathering import kept_indices
from dipnet.models.skipping.pending import Pending, Rotation


@dataclass(frozen=True)
class _Step:
    """The gathered heads, (batch, heads) which sequence keeps which, the gathered groups of heads,
    and by "k" and "v" what their projections make of the token: (batch, 1, kept channels)."""

    heads: Tensor
    wanted: Tensor
    groups: Tensor
    made: Mapping[str, Tensor]


class HeadSkip(Skip):
    """Keys and values go by groups of query heads that share them; without sharing, of one head.

    Those of a group are the same product for the token that is decoded and for the ones before
    that lack them, so that their weights are read once.
    """

    def __init__(self, skipping: Skipping, mask: Deciding) -> None:
        super().__init__(skipping, mask)
        self.groups = self.site.units // self.site.group
        family = skipping.decoder.family
        self.attention: Any = skipping.decoder.module(self.site.layer, family.attention)
        self.rotary = family.rotary

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.step = None
        held = pending.cache_layer(kwargs.get("past_key_values"), self.site.layer)
        if held is None:  # a sequence begins, or keeps no keys: nothing will be missing
            return
        x = args[0] if args else kwargs["hidden_states"]
        stepping = self.skipping.stepping() and self._may_lack(held, x)
        with torch.no_grad():
            if stepping:
                self._take_step(held, x[:, 0], self._rotation(kwargs, len(x)), x)
            elif (lacking := pending.of_layer(held)) is not None and lacking.open:
                everything = torch.arange(self.groups, device=x.device)
                self._make_up(held, lacking, everything, lacking.inputs[:0])
                lacking.clear()

    def _may_lack(self, held: Any, x: Tensor) -> bool:
        reason = pending.why_not(held, x)
        if reason and self.skipping.strict:
            raise BackendError(f"backend 'skip' {reason}; there are: {', '.join(BACKENDS)}")
        return not reason

    def _rotation(self, kwargs: dict[str, Any], batch: int) -> Rotation:
        if not self.rotary:
            return ()
        cos, sin = kwargs["position_embeddings"]
        return tuple(part[:, 0].expand(batch, -1) for part in (cos, sin))

    def _take_step(self, held: Any, x: Tensor, rotation: Rotation, activation: Tensor) -> None:
        """Decide the heads of a token of (batch, width) input, and the keys and values to make."""
        wanted = self.mask.decide(activation)[:, 0]
        lacking = pending.of_layer(held)
        if lacking is None or lacking.inputs.shape[1:] != x.shape:
            lacking = pending.start(held, self.skipping.kept_inputs, x, rotation, self.groups)
        kept = wanted.any(dim=0)
        most = len(wanted) * self.most
        used = kept.unflatten(0, (-1, self.site.group)).any(dim=1) | lacking.due()
        groups = kept_indices(used, most + lacking.most_due)
        made = self._make_up(held, lacking, groups, x[None])
        lacking.add(x, rotation, groups)
        self.step = _Step(kept_indices(kept, most), wanted, groups, made)

    def _make_up(
        self, held: Any, lacking: Pending, groups: Tensor, now: Tensor
    ) -> Mapping[str, Tensor]:
        """Complete the keys and values of ``groups`` in the cache; returns what "k" and "v" make of
        (0 or 1, batch, width) ``now``.

        Of the tokens before, those that lack something are picked on a CPU; elsewhere all are
        computed again, and what they do not lack is left.
        """
        some = lacking.missing.index_select(1, groups)
        places = kept_indices(some.any(dim=1), lacking.tokens)
        late = len(places)
        x = torch.cat([lacking.inputs.index_select(0, places), now])
        made = {name: self._rows(name, x, groups) for name in "kv"}
        if late:
            found = pending.last_places(held, lacking.ages()).index_select(0, places)
            absent = some.index_select(0, places) & (found >= 0).unsqueeze(1)
            rotation = [part.index_select(0, places) for part in lacking.rotation]
            keys = self._finish(self._by_head(made["k"][:late]), rotation)
            self._write(held.keys, keys, absent, found, groups)
            self._write(held.values, self._by_head(made["v"][:late]), absent, found, groups)
            lacking.missing.index_fill_(1, groups, False)
        return {name: part[late:].transpose(0, 1) for name, part in made.items()}

    def _by_head(self, made: Tensor) -> Tensor:
        """(tokens, batch, groups * head size) -> (batch, groups, tokens, head size)."""
        return made.unflatten(-1, (-1, self.site.block)).permute(1, 2, 0, 3)

    def _finish(self, keys: Tensor, rotation: Sequence[Tensor]) -> Tensor:
        """What the model does to (batch, groups, tokens, head size) keys before it keeps them."""
        if (norm := getattr(self.attention, "k_norm", None)) is not None:
            keys = norm(keys)
        if not rotation:
            return keys
        rotate = vars(sys.modules[type(self.attention).__module__])["apply_rotary_pos_emb"]
        cos, sin = (part.transpose(0, 1) for part in rotation)
        finished: Tensor = rotate(keys, keys, cos, sin)[1]
        return finished

    def _write(
        self, kept: Tensor, made: Tensor, absent: Tensor, found: Tensor, groups: Tensor
    ) -> None:
        """Put what was made of some tokens and groups into a layer's keys or values.

        ``absent`` is (tokens, groups) bool, ``found`` where the tokens are. What is absent is zero
        there, so it can be added; and zeros can be added anywhere, for the tokens that are gone.
        """
        late = torch.where(absent.t()[None, :, :, None], made, 0).to(kept.dtype)
        whole = late.new_zeros(len(late), self.groups, *late.shape[2:])
        kept.index_add_(2, found.clamp(min=0), whole.index_copy_(1, groups, late))

    def _made(self, held: tuple[str, ...], module: nn.Linear, x: Tensor) -> Tensor:
        """(batch, 1, width) -> (batch, 1, rows): zero for the heads that are not computed."""
        size = self.site.block
        out = x.new_zeros(*x.shape[:-1], module.out_features)
        for matrix in held:
            queries = matrix == "q"
            index = self.step.heads if queries else self.step.groups
            made = self._rows("q", x, index) if queries else self.step.made[matrix]
            by_head = out[..., self.parts[matrix]].unflatten(-1, (-1, size))
            by_head.index_copy_(-2, index, made.unflatten(-1, (-1, size)))
        return out

    def _end(self, step: _Step, x: Tensor) -> Tensor:
        by_head = x.unflatten(-1, (-1, self.site.block)) * step.wanted[:, None, :, None]
        return self._columns("o", by_head.index_select(-2, step.heads).flatten(-2), step.heads)
