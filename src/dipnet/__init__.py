"""dipnet: LLM inference that touches only the weights each token needs.

Nothing is executed at import: each public name is loaded when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "sparsify": "dipnet.models.attach",
    "restore": "dipnet.models.attach",
    "usage": "dipnet.models.attach",
    "calibrate": "dipnet.adapt.calibration",
    "fit_split": "dipnet.adapt.split",
    "perplexity": "dipnet.eval.perplexity",
    "load_model": "dipnet.models.load",
    "describe": "dipnet.models.families",
    "Dense": "dipnet.methods.dense",
    "DIP": "dipnet.methods.dip",
    "GLUPruning": "dipnet.methods.glu",
    "GatePruning": "dipnet.methods.glu",
    "UpPruning": "dipnet.methods.glu",
    "GLUOracle": "dipnet.methods.glu",
    "CATS": "dipnet.methods.cats",
    "TEAL": "dipnet.methods.teal",
    "WINA": "dipnet.methods.wina",
    "Wanda": "dipnet.methods.wanda",
    "DipnetError": "dipnet.errors",
    "InputError": "dipnet.errors",
    "BackendError": "dipnet.errors",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dipnet' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
