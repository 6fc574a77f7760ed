"""Load a model and its tokenizer: a bundled demo model, a local folder, or a hub id.

safetensors only, never pickle; code from a checkpoint is never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
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

from dipnet.errors import DipnetError, InputError
from dipnet.models.compact import is_compact, read_compact
from dipnet.models.families import context_length, family_name
from dipnet.registry import unknown

DEMO_FOLDER = Path(__file__).parent.parent / "demo"
DEMO_MODELS = {"demo-swiglu": "swiglu", "demo-relu": "relu"}
DEFAULT_MODEL = "demo-swiglu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DOWNLOADED = ("model*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
_SOURCES = (
    "give a local folder with config.json and safetensors weights, a hub id, or one of "
    + ", ".join(DEMO_MODELS)
)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and the name it was asked for by.

    ``weights`` says how a packed model stores them; None for a checkpoint.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: str | None = None

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that the model takes."""
        return context_length(self.model)

    @property
    def device(self) -> str:
        """The name of the device it runs on: a packed model's is the CPU."""
        return "cpu" if self.weights else str(self.model.device)

    @property
    def dtype(self) -> str:
        """The name of the weights' dtype, or of how they are packed."""
        return self.weights or str(self.model.dtype).removeprefix("torch.")


def load_model(
    name: str = DEFAULT_MODEL, *, device: str = "auto", dtype: str = "auto"
) -> LoadedModel:
    """Load ``name``: ``demo-swiglu``, ``demo-relu``, a local folder, or a hub id.

    ``device`` "auto" takes a GPU when there is one; ``dtype`` "auto" the checkpoint's own. Raises
    InputError when the model cannot be found or read, or its family is unknown to dipnet.
    """
    chosen_device = check_device(device)
    chosen_dtype = _dtype(dtype)
    config = load_config(name)
    family_name(config)
    tokenizer = load_tokenizer(name)
    if name in DEMO_MODELS:
        model = _load_demo(DEMO_FOLDER / DEMO_MODELS[name], config, chosen_dtype)
    else:
        model = _load_checkpoint(name, chosen_dtype)
    return LoadedModel(name, model.to(chosen_device).eval(), tokenizer)


def load_config(name: str) -> PretrainedConfig:
    """The Hugging Face config of ``name``, without its weights."""
    if name in DEMO_MODELS:
        return AutoConfig.from_pretrained(DEMO_FOLDER / DEMO_MODELS[name])
    check_name(name)
    remedy = "correct its config.json" if Path(name).is_dir() else _SOURCES
    with _in_one_line(f"cannot load {name!r}", remedy):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def check_name(name: str) -> None:
    """Raise InputError when ``name`` can be neither a hub id nor a checkpoint's folder."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{name!r} holds no config.json: it is no checkpoint ({_SOURCES})")
    elif folder.is_file():
        raise InputError(f"{name!r} is a file: give the checkpoint's folder")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise InputError(f"there is no folder {name!r}: {_SOURCES}")
    elif name.startswith("demo-"):
        raise unknown("model", name, DEMO_MODELS, " Or give a hub id or a local folder.")


def local_folder(name: str) -> Path:
    """The folder of a model's weights and config; a hub id is downloaded to the cache first.

    Raises InputError when there is no such model.
    """
    if name in DEMO_MODELS:
        return DEMO_FOLDER / DEMO_MODELS[name]
    check_name(name)
    if Path(name).is_dir():
        return Path(name)
    with _in_one_line(f"cannot load {name!r}", _SOURCES):
        return Path(snapshot_download(name, allow_patterns=list(_DOWNLOADED)))


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; InputError when one is missing or damaged."""
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.is_file():
        try:
            files = sorted(
                {folder / s for s in json.loads(index.read_text())["weight_map"].values()}
            )
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{index} is damaged: download the checkpoint again") from None
    for file in files:
        _check_safetensors(file)
    return files


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config without storage for its weights: for its shapes only.

    Raises InputError when the family is unknown to dipnet, or the config makes no model.
    """
    family = family_name(config)
    wrong = f"cannot make a {family} model of this config"
    with _in_one_line(wrong, "correct config.json"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_device(device: str) -> torch.device:
    """The torch device of a name; "auto" is a GPU when there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not _DEVICE.fullmatch(device):
        raise InputError(f"unknown device {device!r}; known: auto, cpu, cuda, cuda:1, ..., mps")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {device!r} cannot be used here: {_reason(error)}; use --device cpu"
        ) from None
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


def _load_checkpoint(name: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a folder or hub id; InputError when not every weight comes from it."""
    if Path(name).is_dir():
        shards(Path(name))
    remedy = "download the checkpoint again" if Path(name).is_dir() else _SOURCES
    with _in_one_line(f"cannot load {name!r}", remedy):
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, as an error of ours
        )
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for key in sorted(set(found["missing_keys"]) - tied):
        raise InputError(
            f"the checkpoint {name!r} lacks the weights {key!r}: download or convert it again"
        )
    for key, stored, expected in sorted(found["mismatched_keys"]):
        raise InputError(
            f"{key!r} has the shape {tuple(stored)} in the checkpoint {name!r}, and its config "
            f"says {tuple(expected)}: correct config.json or download the checkpoint again"
        )
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; InputError when there is none or it knows no words."""
    source = DEMO_FOLDER / "tokenizer" if name in DEMO_MODELS else name
    wrong = f"cannot load the tokenizer of {name!r}"
    remedy = "tokenizer.json and tokenizer_config.json belong beside config.json"
    with _in_one_line(wrong, remedy):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if not tokenizer.encode("the", add_special_tokens=False):
            raise InputError(f"{wrong}: it has no vocabulary ({remedy})")
    return tokenizer


@contextmanager
def _in_one_line(message: str, remedy: str) -> Iterator[None]:
    """Turn whatever Hugging Face raises for a broken checkpoint into an error of ours."""
    try:
        yield
    except DipnetError:
        raise
    except ImportError as error:  # says itself what to install
        raise InputError(f"{message}: {_reason(error)}") from None
    except Exception as error:
        raise InputError(f"{message}: {_reason(error)} ({remedy})") from None


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
            f"{path} is truncated or damaged ({_reason(error)}): download it again"
        ) from None


def _reason(error: BaseException) -> str:
    """What went wrong: the first line of the error, or two when it announces the second."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    said = " ".join(lines[: 1 + lines[0].endswith(":")]).rstrip(".,")
    return f"{said} is unknown" if isinstance(error, KeyError) else said
