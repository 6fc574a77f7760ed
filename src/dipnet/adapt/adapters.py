"""Win quality back: adapters that learn, under a method's masks, what the dense model does.

The DIP paper's recovery (https://arxiv.org/abs/2412.01380): low-rank adapters on the MLP's
matrices, distilled from the dense model while the masks are active, then merged into the weights,
so that they cost nothing at run time. docs/adapting.md tells it whole.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import dipnet
from dipnet.adapt.adapter_settings import AdapterSettings
from dipnet.adapt.adapter_state import (
    STATE_NAME,
    STATES_HELD,
    StateFile,
    check_room,
    write_errors,
)
from dipnet.adapt.adapting import Adapting, Progress
from dipnet.adapt.calibration import check_window, whole_windows
from dipnet.adapt.lora import AdaptedDecoder, Lora, check_peft
from dipnet.errors import InputError
from dipnet.files import whole_folder, write_file
from dipnet.methods.base import Method
from dipnet.models.attach import check_dense
from dipnet.models.families import default_window
from dipnet.units import ModelSpec

CARD_NAME = "adapters.json"
ADAPTER_FOLDER = "adapter"
MERGED_FOLDER = "merged"
HELD_OUT_EVERY = 20
"""One window in so many is held out, at most `MOST_HELD_OUT`."""
MOST_HELD_OUT = 32


@dataclass(frozen=True)
class Adapters:
    """What a training left: a PEFT adapter, a checkpoint that has it in its weights, and a card.

    ``perplexity`` is that of the held-out text: of the dense model, of the masked one without
    adapters and with them.
    """

    adapter: Path
    merged: Path
    card: Mapping[str, Any]

    @property
    def perplexity(self) -> Mapping[str, float]:
        """Held-out perplexities: ``dense``, ``masked`` and ``adapted``."""
        found: Mapping[str, float] = self.card["perplexity"]
        return found


def fit_adapters(
    model: PreTrainedModel,
    method: Method,
    tokens: Tensor,
    *,
    out: str | Path,
    window: int | None = None,
    bos: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Adapters:
    """Train adapters of ``model`` under ``method`` on (n,) ``tokens``; the model stays as it is.

    ``settings`` are those of `AdapterSettings`. The text is read in whole windows of ``window``
    tokens (by default the context, at most 2048), each beginning with ``bos`` if given; one in
    twenty is held out and measured. The folder ``out`` gets ``adapter``, which PEFT loads on the
    same model, ``merged``, a checkpoint with the adapter in its weights (and ``tokenizer``, if
    given), and a card, ``adapters.json``; ``text`` is what that says of the text. A training that
    was interrupted goes on from its last state when it is called again with the same arguments; its
    ``rate`` may be another.

    Raises InputError when PEFT is missing, a setting makes no sense, the text is too short, the
    method cannot work on the model, ``out`` holds something else or lacks room, or the loss
    diverges: the last good state is kept then, and the message says how to go on.
    """
    chosen = AdapterSettings(**settings)
    check_peft()
    check_dense(model)
    folder = Path(out)
    decoder = AdaptedDecoder(model)
    method.check(decoder.spec)
    _check_cache(method, chosen)
    windows, held = _divided(model, tokens, window, bos)
    _check_absent(folder)
    check_room(folder, _bytes_needed(model, decoder.spec, chosen.rank))
    file = StateFile(folder, _identity(decoder, method, chosen, tokens, windows[0].shape[1], bos))
    began = time.perf_counter()
    with Adapting(decoder, method, chosen, windows, held, file) as training:
        course = training.run(progress or (lambda *_: None))
        card = {
            "made_by": f"dipnet {dipnet.__version__}",
            "method": repr(method),
            "text": dict(text or {}),
            "settings": asdict(chosen) | {"window": training.window, "bos": bos},
            "tokens": {"trained": course.tokens, "held_out": len(training.held)},
            "perplexity": {
                "dense": training.dense_perplexity,
                "masked": course.history[0][2],
                "adapted": course.best_perplexity,
            },
            "best_step": course.best,
            "history": course.history,
            "device": str(model.device),
            "processes": training.processes.num_processes,
            "seconds": {
                "training": round(course.seconds, 2),
                "this_run": round(time.perf_counter() - began, 2),
            },
        }
        if training.processes.is_main_process:
            _write(folder, training.lora, tokenizer, card)
            file.remove()
        training.processes.wait_for_everyone()
    return Adapters(folder / ADAPTER_FOLDER, folder / MERGED_FOLDER, card)


def _check_cache(method: Method, settings: AdapterSettings) -> None:
    if settings.cache is not None and getattr(method, "cache_aware", None) is None:
        raise InputError(
            f"a cache changes no mask of {method.name} as it is: give it cache_aware, such as "
            "dip:cache_aware=0.2, or leave the cache out"
        )


def _divided(
    model: PreTrainedModel, tokens: Tensor, window: int | None, bos: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The (1, window) windows to train on, and those that are held out."""
    size = default_window(model) if window is None else window
    check_window(model, size)
    body = size - (bos is not None)
    if tokens.numel() < 2 * body:
        raise InputError(
            f"the text has {tokens.numel()} tokens, and two windows of {size} are needed, one of "
            "them held out: give more text or a shorter window"
        )
    windows = whole_windows(tokens.flatten().cpu(), size, bos)
    every = max(min(HELD_OUT_EVERY, len(windows)), -(-len(windows) // MOST_HELD_OUT))
    first = every // 2
    held = windows[first::every]
    return [each for at, each in enumerate(windows) if at % every != first], held


def _check_absent(folder: Path) -> None:
    """Raise InputError when the folder holds what this would not have made."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot write {folder}: it is a file; give a folder")
    if (folder / CARD_NAME).exists():
        raise InputError(f"{folder} holds finished adapters: remove it, or name another folder")
    for name in (ADAPTER_FOLDER, MERGED_FOLDER):  # written while the state is still there
        if (folder / name).exists() and not (folder / STATE_NAME).exists():
            raise InputError(
                f"{folder / name} is there and would be replaced: remove it, or name another folder"
            )


def _bytes_needed(model: PreTrainedModel, spec: ModelSpec, rank: int) -> int:
    """Bytes of the merged checkpoint, the adapter and the states."""
    merged = sum(each.numel() * each.element_size() for each in model.parameters())
    shapes = (spec.matrices[name] for name in spec.mlp_matrices)
    adapter = 4 * rank * spec.layers * sum(map(sum, shapes))
    return merged + (1 + 4 * STATES_HELD) * adapter


def _identity(
    decoder: AdaptedDecoder,
    method: Method,
    settings: AdapterSettings,
    tokens: Tensor,
    window: int,
    bos: int | None,
) -> dict[str, str]:
    """What a state is continued with, and with nothing else."""
    weights = decoder.matrix(0, "down").detach().float().cpu().contiguous()
    return {
        "model": _digest(weights),
        "text": _digest(tokens.flatten().long().cpu().contiguous()),
        "method": repr(method),
        "division of the density": hashlib.sha256(
            repr(method.sites(decoder.spec)).encode()
        ).hexdigest(),
        "thresholds": hashlib.sha256(
            repr(getattr(method, "thresholds", None)).encode()
        ).hexdigest(),
        "window": f"{window}, bos {bos}",
        **settings.decides,
    }


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _write(
    folder: Path, lora: Lora, tokenizer: PreTrainedTokenizerBase | None, card: Mapping[str, Any]
) -> None:
    """The adapter, the merged checkpoint, the card: each under its name when it is whole."""
    with write_errors(folder):
        lora.save_adapter(folder / ADAPTER_FOLDER)
        with whole_folder(folder / MERGED_FOLDER) as unfinished:
            lora.save_merged(unfinished)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
        write_file(folder / CARD_NAME, json.dumps(card, indent=2) + "\n")
