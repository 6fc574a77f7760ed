"""dipnet: LLM inference that touches only the weights each token needs.

Nothing heavy is executed at import: each public name is loaded when it is first used. The methods
are those of the registry.
"""

from importlib import import_module
from typing import Any

from dipnet.registry import METHODS

__version__ = "0.1.0"

_FUNCTIONS = (
    "dipnet.models.attach:sparsify",
    "dipnet.models.attach:restore",
    "dipnet.models.attach:usage",
    "dipnet.models.recording:record",
    "dipnet.cache:CacheSettings",
    "dipnet.cache:CacheSlots",
    "dipnet.models.families:describe",
    "dipnet.models.load:load_model",
    "dipnet.streaming.load:load",
    "dipnet.streaming.load:stats",
    "dipnet.streaming.load:reset_stats",
    "dipnet.adapt.calibration:calibrate",
    "dipnet.adapt.split:fit_split",
    "dipnet.adapt.allocation:fit_allocation",
    "dipnet.adapt.scores:fit_scores",
    "dipnet.adapt.scores:norm_scores",
    "dipnet.adapt.thresholds:fit_thresholds",
    "dipnet.adapt.rotation:rotate",
    "dipnet.adapt.predictors:fit_predictors",
    "dipnet.adapt.adapters:fit_adapters",
    "dipnet.adapt.predictors:measure_predictors",
    "dipnet.eval.perplexity:perplexity",
    "dipnet.methods.allocation:Allocation",
    "dipnet.methods.factors:Factors",
    "dipnet.methods.thresholds:Thresholds",
    "dipnet.methods.predictors:Predictors",
    "dipnet.errors:DipnetError",
    "dipnet.errors:InputError",
    "dipnet.errors:BackendError",
)
_PUBLIC = {target.partition(":")[2]: target for target in (*_FUNCTIONS, *METHODS.values())}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dipnet' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
