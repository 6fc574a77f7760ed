"""Load a model and its tokenizer: a bundled demo model, a local folder, or a hub id.

safetensors only, never pickle; code from a checkpoint is never run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dipnet.errors import InputError
from dipnet.models.compact import is_compact, read_compact
from dipnet.models.families import family_name

DEMO_FOLDER = Path(__file__).parent.parent / "demo"
DEMO_MODELS = {"demo-swiglu": "swiglu", "demo-relu": "relu"}
DEFAULT_MODEL = "demo-swiglu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and the name it was asked for by."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that the model takes."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def dtype(self) -> str:
        """The name of the weights' dtype."""
        return str(self.model.dtype).removeprefix("torch.")


def load_model(
    name: str = DEFAULT_MODEL, *, device: str = "auto", dtype: str = "auto"
) -> LoadedModel:
    """Load ``name``: ``demo-swiglu``, ``demo-relu``, a local folder, or a hub id.

    ``device`` "auto" takes a GPU when there is one; ``dtype`` "auto" the checkpoint's own. Raises
    InputError when the model cannot be found or read, or its family is unknown to dipnet.
    """
    config = load_config(name)
    family_name(config)
    chosen_device = check_device(device)
    chosen_dtype = _dtype(dtype)
    if name in DEMO_MODELS:
        model = _load_demo(DEMO_FOLDER / DEMO_MODELS[name], config, chosen_dtype)
        tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer")
    else:
        _check_weights(Path(name))
        model = _from_pretrained(
            AutoModelForCausalLM, name, dtype=chosen_dtype or "auto", use_safetensors=True
        )
        tokenizer = _from_pretrained(AutoTokenizer, name)
    return LoadedModel(name, model.to(chosen_device).eval(), tokenizer)


def load_config(name: str) -> PretrainedConfig:
    """The Hugging Face config of ``name``, without its weights."""
    if name in DEMO_MODELS:
        return AutoConfig.from_pretrained(DEMO_FOLDER / DEMO_MODELS[name])
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(f"{name!r} holds no config.json: it is not a Hugging Face checkpoint")
    return _from_pretrained(AutoConfig, name)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config without storage for its weights: for its shapes only."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_device(device: str) -> torch.device:
    """The torch device of a name; "auto" is a GPU when there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here: {_first_line(error)}") from None
    return chosen


def _dtype(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _load_demo(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype | None
) -> PreTrainedModel:
    path = folder / "model.safetensors"
    _check_safetensors(path)
    if not is_compact(path):
        raise InputError(f"{path} is not a bundled model: install dipnet again")
    model = AutoModelForCausalLM.from_config(config)
    missing = nn.Module.load_state_dict(model, read_compact(path), strict=False).missing_keys
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if set(missing) - tied:
        raise InputError(f"{path} lacks {sorted(set(missing) - tied)[0]}: install dipnet again")
    model.tie_weights()
    return model.to(dtype or torch.float32)


def _from_pretrained(cls: Any, name: str, **options: Any) -> Any:
    """``cls.from_pretrained`` without remote code, and with its failures as one-line errors."""
    try:
        return cls.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError) as error:
        raise InputError(
            f"cannot load {name!r}: {_first_line(error)} (give a local folder with config.json and "
            f"safetensors weights, a hub id, or one of {', '.join(DEMO_MODELS)})"
        ) from None


def _check_weights(folder: Path) -> None:
    """Raise InputError when a local checkpoint's safetensors files are missing or damaged."""
    if not folder.is_dir():
        return
    index = folder / "model.safetensors.index.json"
    shards = [folder / "model.safetensors"]
    if index.is_file():
        try:
            shards = sorted(
                {folder / s for s in json.loads(index.read_text())["weight_map"].values()}
            )
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{index} is damaged: download the checkpoint again") from None
    for shard in shards:
        _check_safetensors(shard)


def _check_safetensors(path: Path) -> None:
    if not path.is_file():
        raise InputError(
            f"{path} is missing: dipnet reads safetensors only; download the checkpoint again or "
            "convert it with transformers' save_pretrained"
        )
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is truncated or damaged ({_first_line(error)}): download it again"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
