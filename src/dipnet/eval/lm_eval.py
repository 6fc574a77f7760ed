"""dipnet's models in EleutherAI's lm-evaluation-harness: MMLU and the rest, as the papers use it.

    python -m dipnet.eval.lm_eval --model dipnet \\
        --model_args pretrained=MODEL,method=dip,density=0.5 --tasks mmlu --num_fewshot 5

takes every option of ``lm_eval``, which finds models of its own only: importing this module adds
``dipnet`` to them. Every token is pruned, those of the prompt too: a question whose answers are
scored is all prompt.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from dipnet.errors import DipnetError, InputError
from dipnet.methods.base import Method
from dipnet.methods.request import parse_method
from dipnet.models.attach import attached_method, sparsify, usage
from dipnet.models.load import DEFAULT_MODEL, LoadedModel, load_model, load_tokenizer
from dipnet.models.recording import method_text
from dipnet.streaming.load import load
from dipnet.streaming.methods import unit_for
from dipnet.streaming.packed import is_store, store_of

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    MISSING = f"lm-evaluation-harness is not there ({error}): pip install 'dipnet[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(f"dipnet: error: {MISSING}")
    raise InputError(MISSING) from None

DEFAULT_DENSITY = 0.5
HARNESS_OPTIONS = (
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
"""The arguments of the harness's own Hugging Face models that mean something here."""
PACKED_OPTIONS = ("memory", "cache", "policy", "weights")


@register_model("dipnet")
class DipnetLM(HFLM):
    """A model under a method: log-likelihoods, rolling ones, and generation.

    ``pretrained`` is a checkpoint, a hub id, a bundled model or a store, ``method`` as on dipnet's
    command line; its options may also stand beside it (``method=dip,density=0.5,split=1.4``).
    ``memory``, ``cache``, ``policy`` and ``weights`` are those of `dipnet.load`; ``device``,
    ``dtype`` and ``backend`` of checkpoints. The arguments in `HARNESS_OPTIONS` are the harness's.

    Raises InputError as `dipnet.load` and `dipnet.sparsify` do.
    """

    def __init__(
        self,
        pretrained: str = DEFAULT_MODEL,
        method: str = "dip",
        density: float | None = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
        backend: str = "auto",
        **options: Any,
    ) -> None:
        of_harness = {name: options.pop(name) for name in HARNESS_OPTIONS if name in options}
        packed = {name: options.pop(name) for name in PACKED_OPTIONS if name in options}
        asked = requested(method, density, options)
        self.packed = bool(packed) or is_store(pretrained)
        if self.packed:
            for option, value in (("device", device), ("dtype", dtype), ("backend", backend)):
                if value not in (None, "auto", "cpu"):
                    raise InputError(f"{option} has no effect on a packed model: leave it out")
            loaded = _streamed(pretrained, asked, packed)
        else:
            loaded = load_model(pretrained, device=device or "auto", dtype=dtype)
            sparsify(loaded.model, asked, backend=backend)
        super().__init__(loaded.model, tokenizer=loaded.tokenizer, **of_harness)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: the method, and the densities measured."""
        density = asdict(usage(self.model).density())
        counted = {name: density[name] for name in ("tokens", "mlp", "attention", "total", "added")}
        about = {"method": method_text(attached_method(self.model)), "density": counted}
        # Of a packed model the harness would count parameters that are not there.
        known = {} if self.packed else super().get_model_info()
        return {**known, "dipnet": about}


def requested(method: str, density: float | None, options: dict[str, Any]) -> Method:
    """The method with the options that stand beside it; InputError for one that it lacks."""
    more = ",".join(f"{name}={value}" for name, value in options.items())
    request = parse_method(f"{method}{',' if ':' in method else ':'}{more}" if more else method)
    if density is None and request.takes_density:
        density = DEFAULT_DENSITY
    return request.build(density)


def _streamed(name: str, method: Method, options: dict[str, Any]) -> LoadedModel:
    """The model of a store, or of a checkpoint that ``weights`` says how to pack."""
    weights = options.pop("weights", None)
    store = store_of(name, weights, unit=unit_for(method))
    model = load(store, method, prefill="sparse", **options)
    vars(model)["tie_weights"] = _nothing  # the harness calls it, and there are none to tie
    return LoadedModel(str(store), model, load_tokenizer(str(store)), weights or "packed")


def _nothing(*_: object, **__: object) -> None:
    pass


def main() -> None:
    """``lm_eval``, with dipnet's models; an error of ours is one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except DipnetError as error:
        sys.exit(f"dipnet: error: {error}")


if __name__ == "__main__":
    main()
