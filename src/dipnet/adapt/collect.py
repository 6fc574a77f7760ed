"""What predictors learn from: residual streams and what their layers wanted, in a stream.

The dense model runs over some windows of text at a time. Of every token it keeps the residual
stream at the places that predictors read, in 16 bits, and for every unit one byte: zero where it
was not wanted, else how much it was worth. A `Sample` holds a bounded number of tokens, so memory
does not grow with the text. Where gradients decide what a unit is worth (ShadowLLM), the loss of
the windows is taken back through the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dipnet.errors import InputError
from dipnet.kernels import topk_mask
from dipnet.methods.predictors import Kind
from dipnet.models.families import Decoder
from dipnet.models.residual import Residual
from dipnet.models.tokens import TokenState
from dipnet.units import kept_units, residual_place

Target = Literal["active"] | float
"""Which units a token wants: those whose activation is not zero, or the top share of them."""
Criterion = Literal["magnitude", "gradient"]
"""What makes a unit matter: what it puts out, or that times the gradient of the loss."""
SITE_OF: dict[Kind, str] = {"mlp": "mlp.neuron", "head": "attn.head"}
CODE = torch.float8_e5m2
"""How a unit's worth is kept: a byte, right to an eighth, which a loss's weight need not exceed."""
LEAST, MOST = torch.finfo(CODE).smallest_normal, torch.finfo(CODE).max


@dataclass(frozen=True)
class Rule:
    """Which units of a kind a token wants, and what each is worth in the loss.

    A wanted unit is worth ``positive_weight`` times its magnitude to the power ``magnitude``, over
    the mean of that in its layer; what is not wanted counts 1. Power 0 makes all worth the same.

    With the ``criterion`` "magnitude" that is the size of what a neuron puts out, and the L2 norm
    of what a head does; with "gradient" the L1 norm of that times the gradient of the loss, which
    ShadowLLM found best of several (https://arxiv.org/abs/2406.16635, "plainact").
    """

    target: Target
    magnitude: float
    positive_weight: float
    criterion: Criterion = "magnitude"

    def worth(self, magnitudes: Tensor) -> Tensor:
        """(tokens, units) magnitudes -> (tokens, units) float32 worth, 0 where not wanted."""
        wanted = magnitudes != 0
        if self.target != "active":
            wanted &= topk_mask(magnitudes, kept_units(self.target, magnitudes.shape[-1]))
        return torch.where(wanted, magnitudes**self.magnitude, 0)


@dataclass(frozen=True)
class Seen:
    """Some tokens: ``places`` (places, tokens, width), and by kind (layers, tokens, units) bytes.

    ``places`` are in bfloat16 for a model in bfloat16, else in float16.
    """

    places: Tensor
    codes: Mapping[Kind, Tensor]

    @property
    def tokens(self) -> int:
        """How many."""
        return self.places.shape[1]


def decoded(codes: Tensor) -> Tensor:
    """(...) bytes -> (...) float32: what each unit was worth, 0 where it was not wanted."""
    return codes.view(CODE).float()


class Collector:
    """Runs the dense model and keeps what predictors learn from.

    ``rules`` says what a token wants of each kind. The tokens seen go to ``device``.
    """

    def __init__(
        self,
        decoder: Decoder,
        rules: Mapping[Kind, Rule],
        look_ahead: int,
        device: torch.device,
    ) -> None:
        self.decoder = decoder
        self.rules = rules
        self.device = device
        layers = range(decoder.spec.layers)
        self.read = {
            kind: [residual_place(layer, SITE_OF[kind], look_ahead) for layer in layers]
            for kind in rules
        }
        self.places = sorted({place for read in self.read.values() for place in read})
        self._gradients = any(rule.criterion == "gradient" for rule in rules.values())
        self._outputs: dict[tuple[Kind, int], Tensor] = {}
        self._means: dict[tuple[Kind, int], Tensor] = {}
        self._codes: dict[tuple[Kind, int], Tensor] = {}
        self._finite = torch.ones(len(self.places), dtype=torch.bool, device=device)

    def rows(self, kind: Kind) -> list[int]:
        """For each layer the row of `Seen.places` that its predictor reads."""
        return [self.places.index(place) for place in self.read[kind]]

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token in a `Sample`."""
        spec = self.decoder.spec
        units = {"mlp": spec.neurons, "head": spec.heads}
        codes = spec.layers * sum(units[kind] for kind in self.rules)
        return 2 * len(self.places) * spec.width + codes

    def see(self, windows: Tensor) -> Seen:
        """(n, window) tokens -> what the model computed for each of them."""
        with self._watching() as residual:
            if self._gradients:
                self._run_back(windows)
            else:
                with torch.no_grad():
                    self.decoder.model.get_decoder()(input_ids=windows, use_cache=False)
            with torch.no_grad():
                places = torch.stack([self._narrow(residual.at(place)) for place in self.places])
        self._finite &= places.isfinite().flatten(1).all(dim=1)
        codes = {
            kind: torch.stack([self._codes.pop((kind, layer)) for layer in range(len(read))])
            for kind, read in self.read.items()
        }
        return Seen(places, codes)

    @torch.enable_grad()
    def _run_back(self, windows: Tensor) -> None:
        """Code what the units put out by the gradient of the windows' summed loss.

        A window's last token has no target, no gradient, and so wants nothing.
        """
        logits = self.decoder.model(input_ids=windows, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(
            logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"
        )
        outputs, self._outputs = self._outputs, {}
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for (kind, layer), gradient in zip(outputs, gradients, strict=True):
            self._codes[kind, layer] = self._coded(kind, layer, outputs[kind, layer], gradient)

    def check_finite(self) -> None:
        """Raise InputError when a residual stream that was seen is not finite."""
        for place, finite in zip(self.places, self._finite.tolist(), strict=True):
            if not finite:
                layer, block = divmod(place, 2)
                raise InputError(
                    f"the residual stream before the {('attention', 'MLP')[block]} of layer "
                    f"{layer} is not finite in 16 bits: check the checkpoint, or load it in "
                    "bfloat16, which reaches further than float16"
                )

    def check_labels(self, sample: Sample) -> None:
        """Raise InputError when there is nothing to learn in a layer: it wants all or nothing."""
        for kind, codes in sample.codes.items():
            self._check_labels(kind, codes[:, : sample.tokens])

    def _check_labels(self, kind: Kind, codes: Tensor) -> None:
        name = {"mlp": "neuron", "head": "head"}[kind]
        shares = torch.stack(
            [of_layer.ne(0).sum() / of_layer.numel() for of_layer in codes]
        ).tolist()
        for layer, share in enumerate(shares):
            if share == 0:
                raise InputError(
                    f"no {name} of layer {layer} is ever active in this text: there is nothing to "
                    "predict; check the checkpoint"
                )
            if share == 1:
                raise InputError(
                    f"every {name} of layer {layer} is wanted by every token: there is nothing to "
                    f"predict; the target must be a top share such as 0.2, not {self._target(kind)}"
                )

    def _target(self, kind: Kind) -> str:
        target = self.rules[kind].target
        return repr(target) if target == "active" else f"{target:g}"

    @contextmanager
    def _watching(self) -> Iterator[Residual]:
        residual = Residual(self.decoder, self.places, TokenState("sparse"))
        undo = residual.watch()
        try:
            for layer in range(self.decoder.spec.layers):
                undo += [self._hook(layer, kind) for kind in self.rules]
            yield residual
        finally:
            for each in undo:
                each()

    def _hook(self, layer: int, kind: Kind) -> Callable[[], None]:
        module: nn.Module = self.decoder.holder(layer, {"mlp": "down", "head": "o"}[kind])

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not self._gradients:
                self._codes[kind, layer] = self._coded(kind, layer, args[0])
                return None
            # where all weights are frozen, gradients begin here
            x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            self._outputs[kind, layer] = x
            return (x, *args[1:])

        return module.register_forward_pre_hook(keep).remove

    def _coded(self, kind: Kind, layer: int, x: Tensor, gradient: Tensor | None = None) -> Tensor:
        """(..., channels) input of ``down`` or ``o``, and its gradient -> (tokens, units) bytes."""
        rule = self.rules[kind]
        values, order = x.detach().flatten(0, -2).float(), 2
        if gradient is not None and rule.criterion == "gradient":
            values, order = values * gradient.flatten(0, -2).float(), 1
        if kind == "head":
            by_head = values.unflatten(-1, (self.decoder.spec.heads, -1))
            magnitudes = torch.linalg.vector_norm(by_head, ord=order, dim=-1)
        else:
            magnitudes = values.abs()
        worth = rule.worth(magnitudes)
        if (kind, layer) not in self._means:  # of the first call: later ones are weighted alike
            mean = worth.sum() / (worth != 0).sum().clamp_min(1)
            self._means[kind, layer] = torch.where(mean > 0, mean, 1)
        scaled = worth * (rule.positive_weight / self._means[kind, layer])
        coded = torch.where(worth != 0, scaled.clamp(LEAST, MOST), 0)
        return coded.to(CODE).view(torch.uint8).to(self.device)

    def _narrow(self, x: Tensor) -> Tensor:
        """(..., width) -> (tokens, width) in 16 bits."""
        half = x.dtype if x.dtype == torch.bfloat16 else torch.float16
        return x.flatten(0, -2).to(self.device, half)


class Sample:
    """A bounded number of tokens: the newest take the places of the oldest.

    ``places`` and ``codes`` are as in `Seen`, with room for ``room`` tokens, of which the first
    ``tokens`` hold one.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.tokens = 0
        self._at = 0
        self.places = torch.empty(0)
        self.codes: dict[Kind, Tensor] = {}

    def add(self, seen: Seen) -> None:
        """Take in some tokens: at most ``room``."""
        if not self.codes:
            self.places = self._room_for(seen.places)
            self.codes = {kind: self._room_for(codes) for kind, codes in seen.codes.items()}
        done = 0
        while done < seen.tokens:
            count = min(seen.tokens - done, self.room - self._at)
            here, there = slice(self._at, self._at + count), slice(done, done + count)
            self.places[:, here] = seen.places[:, there]
            for kind, codes in seen.codes.items():
                self.codes[kind][:, here] = codes[:, there]
            done += count
            self.tokens = max(self.tokens, self._at + count)
            self._at = (self._at + count) % self.room

    def _room_for(self, like: Tensor) -> Tensor:
        return like.new_zeros(like.shape[0], self.room, like.shape[2])


def calls(windows: Sequence[Tensor], tokens: int) -> Iterator[Tensor]:
    """(1, window) windows -> (n, window) batches of about so many tokens, all of one length."""
    size = max(1, tokens // windows[0].shape[1])
    for start in range(0, len(windows), size):
        yield torch.cat(list(windows[start : start + size]))
