"""Attach a method's masks to a loaded Hugging Face model, and take them off again.

Every mask acts on the *input* of the linear layers that it thins, by hooks: a dropped input
channel is zero, and a dropped neuron is a zero in the input of ``down``, which makes its rows of
``gate`` and ``up`` irrelevant too. So the model's own code runs, whatever its family fuses, and
the result is what a program computes that never reads the dropped weights. This is the reference
that faster backends are tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from dipnet.cache import Cache, CacheSettings, CacheSlots
from dipnet.errors import InputError
from dipnet.methods.base import Method, SiteKey
from dipnet.models.backends import choose, out_of_memory
from dipnet.models.caching import CacheState, SiteCache, check_not_recomputed
from dipnet.models.calls import Calls
from dipnet.models.decoding import Decoding
from dipnet.models.families import Decoder
from dipnet.models.masks import SiteMasks
from dipnet.models.residual import Residual
from dipnet.models.skipping import KEPT_INPUTS, attach_skip
from dipnet.models.skipping.base import Skipping
from dipnet.models.tokens import Prefill, TokenState
from dipnet.models.usage import Usage
from dipnet.units import Site

Model = TypeVar("Model", bound=PreTrainedModel)
ATTACHED = "_dipnet_attachment"
"""The attribute of a model that holds what was attached to it."""


def sparsify(
    model: Model,
    method: Method,
    *,
    prefill: Prefill = "sparse",
    cache: CacheSettings | CacheSlots | None = None,
    backend: str = "auto",
    kept_inputs: int = KEPT_INPUTS,
) -> Model:
    """Make a loaded causal LM decode with ``method``; returns the same model.

    ``with sparsify(model, method):`` restores the model on leaving; ``restore(model)`` does the
    same at any time, exactly: the weights are never written. ``prefill`` says how a prompt is
    processed: "sparse" like every other token, "dense", or the number of leading positions of
    each sequence that stay dense. "dense" takes as prompt what the first forward call of a
    sequence holds (with an empty key/value cache). Move or cast the model before, not while it is
    sparsified: what the method derived from the weights stays where it was made.

    ``cache`` gives every site a cache of its units, as an engine that streams them from disk has
    (`CacheSettings`: a share of them; `CacheSlots`: a number for each site):
    masks are then decided token after token (a batch's rows one after the other), a cache-aware
    method prefers what is resident, and ``usage(model).cache()`` tells the hits. The caches start
    empty and stay warm from one sequence to the next. Dense prompts and padding do not use them.
    Without ``cache`` everything is in memory.

    ``backend`` is "reference", which computes everything and multiplies with masks; "gpu", whose
    kernels in decoding read what the masks keep, for up to eight sequences; "skip", which does in
    plain torch; or "auto": of "gpu" on a GPU and "skip" on a CPU what serves, else the reference.
    On "gpu", parameters become views of other memory until the model is restored, and
    ``generate()`` runs our own loop where that knows the family. "skip" serves where neurons and
    heads are chosen before their block, as by Deja Vu's predictors. Keys and values of skipped
    heads are computed when a head next needs them, from what attention read for the last
    ``kept_inputs`` tokens, and in turn before one of these is forgotten. A call with gradients, or
    of several tokens a sequence, skips nothing.

    Raises InputError when the family is unknown, the method cannot work on it or lacks its
    calibration, or the model is sparsified already, and BackendError when the backend cannot serve
    the method on this model; the model is then unchanged.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model is a transformers model, not {type(model).__name__}")
    if not isinstance(method, Method):
        raise InputError(f"method is a method such as dipnet.DIP(density=0.5), not {method!r}")
    check_dense(model)
    if not isinstance(cache, CacheSettings | CacheSlots | None):
        raise InputError(f"cache is a dipnet.CacheSettings such as share=0.5, not {cache!r}")
    attachment = Attachment(Decoder(model), method, prefill, cache=cache)
    attachment.choose_backend(backend, kept_inputs)
    try:
        attachment.attach()
    except torch.OutOfMemoryError:
        if attachment.decoding is None or not out_of_memory(backend, attachment.decoder):
            raise
        attachment.decoding = None
        attachment.attach()
    return model


def check_dense(model: PreTrainedModel) -> None:
    """Raise InputError when the model is sparsified."""
    if hasattr(model, ATTACHED):
        attached = getattr(model, ATTACHED).method.name
        raise InputError(f"the model runs {attached} already: call dipnet.restore(model) first")


def restore(model: PreTrainedModel) -> None:
    """Undo ``sparsify`` exactly; a model that is not sparsified is left as it is."""
    if hasattr(model, ATTACHED):
        getattr(model, ATTACHED).detach()


def usage(model: PreTrainedModel) -> Usage:
    """The counts of a sparsified model; InputError when it is not sparsified."""
    if not hasattr(model, ATTACHED):
        raise InputError("the model is not sparsified: call dipnet.sparsify(model, method) first")
    return cast(Usage, getattr(model, ATTACHED).usage)


def attached_method(model: PreTrainedModel) -> Method:
    """The method that a model runs; InputError when it is not sparsified."""
    usage(model)
    return cast(Method, getattr(model, ATTACHED).method)


def attached_prefill(model: PreTrainedModel) -> Prefill | None:
    """How a sparsified model processes a prompt; None for a dense model."""
    attachment: Attachment | None = getattr(model, ATTACHED, None)
    return attachment.tokens.prefill if attachment else None


def sample(model: PreTrainedModel, input_ids: Tensor, **options: Any) -> Any:
    """Hugging Face's loop over tokens, drawn or greedy; ours where that serves the call."""
    decoding = getattr(model, ATTACHED).decoding
    made = decoding.sample(model, input_ids, **options)
    return made if made is not None else GenerationMixin._sample(model, input_ids, **options)


class Attachment:
    """One method on one model: what was changed, and how to undo it.

    Whatever is hooked or kept for undoing is a method or a partial, never a closure: a deep copy of
    the model then has an attachment of its own. ``layers`` limits it to some decoder layers; the
    others stay dense.
    """

    def __init__(
        self,
        decoder: Decoder,
        method: Method,
        prefill: Prefill = "sparse",
        layers: Collection[int] | None = None,
        cache: CacheSettings | CacheSlots | None = None,
    ) -> None:
        self.model = decoder.model
        self.decoder = decoder
        if layers is None:
            method.check(self.decoder.spec)
        else:  # a trial on some layers while the method is being calibrated
            method.check_model(self.decoder.spec)
        self.method = method.prepare(self.decoder, self.decoder.spec)
        self.layers = range(self.decoder.spec.layers) if layers is None else layers
        self.usage = Usage(self.method, self.decoder.spec)
        sites = [site for site in self.usage.sites.values() if site.layer in self.layers]
        self.tokens = TokenState(prefill, positions=any(s.scored_on == "position" for s in sites))
        self.residual = Residual.of_sites(decoder, sites, self.tokens)
        self.cache = cache
        self.caches: dict[SiteKey, Cache] = {}
        self.skipping: Skipping | None = None
        self.decoding: Decoding | None = None
        self._undo: list[Callable[[], None]] = []

    def choose_backend(self, backend: str, kept_inputs: int) -> None:
        """Take the backend of that name; BackendError if it cannot serve."""
        chosen = choose(
            backend,
            self.decoder,
            self.method,
            tuple(self.usage.sites.values()),
            kept_inputs=kept_inputs,
            cached=self.cache is not None,
        )
        if chosen == "skip":
            strict = backend == "skip"
            self.skipping = Skipping(self.decoder, self.tokens, self.usage, kept_inputs, strict)
        if chosen == "gpu":
            watched = self.tokens, self.residual, self.usage
            strict = backend == "gpu"
            self.decoding = Decoding(self.decoder, self.method, *watched, kept_inputs, strict)

    def attach(self) -> None:
        """Hook every site and swap in statically pruned weights; all or nothing."""
        try:
            self._enter_context_class()
            self._undo += Calls(self.model, self.tokens, self.usage, self.decoding).watch()
            self._undo += self.residual.watch()
            for site in self.usage.sites.values():
                if site.layer in self.layers:
                    self._attach_site(site)
            for layer in self.layers:
                self._swap_weights(layer)
            if self.decoding is not None:
                self.decoding.attach(self._undo)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Undo everything, last change first."""
        while self._undo:
            self._undo.pop()()

    def caching(self) -> CacheState | None:
        """The caches of the sites; None without any."""
        if self.cache is None or not self.caches:
            return None
        slots = {key: site.units for key, site in self.usage.sites.items()}
        slots |= {key: cache.slots for key, cache in self.caches.items()}
        warm = any(cache.resident.any() for cache in self.caches.values())
        return CacheState(self.cache.policy, slots, warm)

    def guesses(self) -> Mapping[str, tuple[int, int]]:
        """Records read ahead, and those of them that were wanted, by site: there are none."""
        return {}

    def _enter_context_class(self) -> None:
        """Let the model itself be a context manager: a subclass of its class, under its name."""
        original = type(self.model)
        methods: dict[str, Any] = {
            "__enter__": lambda model: model,
            "__exit__": lambda model, *_: restore(model),
        }
        if self.decoding is not None:
            methods["_sample"] = sample
        sparse = type(
            original.__name__,
            (original,),
            {**methods, "__doc__": original.__doc__, "__module__": original.__module__},
        )
        self.model.__class__ = sparse
        setattr(self.model, ATTACHED, self)
        self._undo.append(partial(self._leave_context_class, original))

    def _leave_context_class(self, original: type) -> None:
        self.model.__class__ = original
        delattr(self.model, ATTACHED)

    def _hook(self, module: nn.Module, change: Callable[..., Any]) -> None:
        handle = module.register_forward_pre_hook(change, with_kwargs=True)
        self._undo.append(handle.remove)

    def _prune(self, mask: SiteMask, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """The mask's hook, but in the steps that read kept weights only."""
        if self.decoding is not None and self.decoding.stepping:
            return None
        return mask(module, args, kwargs)

    def _attach_site(self, site: Site) -> None:
        family = self.decoder.family
        place = {
            "attn.in": family.attention,
            "attn.out": family.path("o"),
            "attn.head": family.path("o"),
            "mlp.in": family.mlp,
            "mlp.hidden": family.path("down"),
            "mlp.neuron": family.path("down"),
        }[site.name]
        cache = self._make_cache(site)
        mask = SiteMask(site, self.method, self.tokens, self.usage, cache, self.residual)
        if site.scored_on == "gate":
            self._watch(self.decoder.module(site.layer, family.activation), mask)
        elif site.scored_on == "up":
            self._watch(self.decoder.holder(site.layer, "up"), mask, self.decoder.rows("up"))
        if self.skipping is not None:
            self._undo += attach_skip(self.skipping, mask)
        else:
            self._hook(self.decoder.module(site.layer, place), partial(self._prune, mask))

    def _make_cache(self, site: Site) -> SiteCache | None:
        key = site.layer, site.name
        made = self.cache.make(site.units, key) if self.cache else None
        if made is None:
            return None
        self.caches[key] = made
        return SiteCache(site, self.method, made)

    def _watch(self, module: nn.Module, mask: SiteMask, part: slice | None = None) -> None:
        """Score the site on what ``module`` puts out (the channels in ``part``)."""
        handle = module.register_forward_hook(partial(mask.see, part))
        self._undo.append(handle.remove)

    def _swap_weights(self, layer: int) -> None:
        for path, held in self.decoder.family.modules.items():
            masks = [self.method.weight_mask(layer, matrix) for matrix in held]
            if any(mask is not None for mask in masks):
                self._swap_weight(self.decoder.module(layer, path), held, masks)

    def _swap_weight(self, module: Any, held: tuple[str, ...], masks: list) -> None:
        """Replace a parameter by a pruned copy; the original stays as it is, kept aside."""
        original = module.weight
        pruned = original.detach().clone()
        for matrix, mask in zip(held, masks, strict=True):
            if mask is not None:
                pruned[self.decoder.rows(matrix)] *= mask
        module.weight = nn.Parameter(pruned, requires_grad=original.requires_grad)
        self._undo.append(partial(setattr, module, "weight", original))


class SiteMask:
    """The hook of one site: (..., n) input -> the same with dropped units set to zero.

    Multiplied rather than filled, so that a NaN among dropped units still shows.
    """

    def __init__(
        self,
        site: Site,
        method: Method,
        tokens: TokenState,
        usage: Usage,
        cache: SiteCache | None,
        residual: Residual,
    ) -> None:
        self.site = site
        self.residual = residual
        self.masks = SiteMasks(site, method, usage, cache)
        self.tokens = tokens
        self.scored: Tensor | None = None

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Torch's forward pre-hook: the module's arguments with the input pruned."""
        if self.tokens.all_dense:
            return None
        if args:
            return (self.prune(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.prune(kwargs["hidden_states"])}

    def see(self, part: slice | None, _module: nn.Module, _args: Any, output: Tensor) -> None:
        """Torch's forward hook: keep the activation that the score reads."""
        if not self.tokens.all_dense:  # else it would be kept, and never used
            self.scored = output if part is None else output[..., part]

    def decide(self, x: Tensor) -> Tensor:
        """(..., n) input, or another activation of these tokens -> (..., units) bool, counted."""
        scored = self._scored(x)
        if self.masks.cache is not None and self.masks.cache.sequential:
            check_not_recomputed(self.tokens.running)
        return self.masks.decide(
            scored,
            dense=self._per_token(self.tokens.dense, scored),
            counted=self._per_token(self.tokens.counted, scored),
            count=self.tokens.running,
        )

    def prune(self, x: Tensor) -> Tensor:
        """(..., channels) -> (..., channels): decide the mask, apply it."""
        mask = self.decide(x)
        return x * (mask if self.site.block == 1 else mask.repeat_interleave(self.site.block, -1))

    def _scored(self, x: Tensor) -> Tensor:
        """What the score reads, in the leading shape of ``x``."""
        match self.site.scored_on:
            case "input" | "hidden" | "heads":
                return x
            case "residual" | "position":
                found = self.residual.known(self.site)
            case _:
                found, self.scored = self.scored, None
        assert found is not None, "the scored activation is computed before its site"
        # OPT's MLP flattens the tokens; another layer may be on another device.
        return found.reshape(*x.shape[:-1], found.shape[-1]).to(x.device)

    @staticmethod
    def _per_token(flags: Tensor | None, x: Tensor) -> Tensor | None:
        """(batch, tokens) flags in the leading shape of ``x``: OPT flattens the two."""
        return None if flags is None else flags.reshape(x.shape[:-1]).to(x.device)
