"""``dipnet fit split``: how a density is best divided between DIP's two masks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dipnet.cli.console import err, out, print_json, quiet_libraries, titled_table
from dipnet.cli.inputs import check_window, load, split_tokens
from dipnet.cli.methods import MethodRequest, parse_method, unique
from dipnet.cli.options import (
    Densities,
    Device,
    DividedMethod,
    Dtype,
    Json,
    Model,
    TextToFit,
    Window,
)
from dipnet.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from dipnet.methods.dip import DIP
    from dipnet.models.load import LoadedModel

SCHEMA = "dipnet.fit-split/1"
DEFAULT_DENSITY = 0.5


def fit_split(
    text: TextToFit,
    model: Model = None,
    method: DividedMethod = "dip",
    density: Densities = None,
    window: Window = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Find how DIP-like methods best divide a density between their two masks.

    The result is used as --method dip:split=1.4 in the other commands.

    Example: dipnet fit split --text valid.txt --density 0.5
    """
    methods = _methods(parse_method(method), density)
    quiet_libraries()
    from dipnet.eval.texts import read_text

    content = read_text(text)
    loaded = load(model, device, dtype)
    window = check_window(loaded, window)
    used = split_tokens(loaded, content, window)
    fits = [_fit(loaded, each, used.tokens, window) for each in methods]
    if json:
        about = {"schema": SCHEMA, "model": loaded.name, "method": method, "window": window}
        print_json({**about, "text": used.as_json(), "fits": fits})
    else:
        for fit in fits:
            _show(method, fit)


def _methods(request: MethodRequest, densities: list[float] | None) -> list[DIP]:
    """The methods to fit, one for each density; the method's own one is enough."""
    own = [DEFAULT_DENSITY if request.takes_density else None]
    return [_method(request, density) for density in unique(densities or own)]


def _method(request: MethodRequest, density: float | None) -> DIP:
    """The method to fit; InputError when it has no split to find."""
    from dipnet.methods.dip import DIP

    built = request.build(density)
    if not isinstance(built, DIP):
        raise InputError(f"{request.label} has no split to fit: use dip or wina")
    if built.has_own_division:
        raise InputError(
            f"{request.label} says already how its density is divided: leave that out to fit it"
        )
    return built


def _fit(loaded: LoadedModel, method: DIP, tokens: Tensor, window: int) -> dict[str, Any]:
    """The best split at the method's density, and all that were tried."""
    import dipnet
    from dipnet.eval.texts import bos_token
    from dipnet.models.families import describe

    assert method.density is not None
    spec = describe(loaded.model)
    with err.status(f"density {method.density:g}") as status:
        fitted = dipnet.fit_split(
            loaded.model,
            method,
            tokens,
            window=window,
            bos=bos_token(loaded.tokenizer),
            progress=lambda split, _: status.update(f"density {method.density:g}, split {split:g}"),
        )[1]
    tried = []
    for split, perplexity in fitted.perplexities.items():
        input_density, hidden_density = replace(method, split=split).densities(spec)
        tried.append(
            {
                "split": split,
                "input_density": input_density,
                "hidden_density": hidden_density,
                "perplexity": perplexity,
            }
        )
    return {"density": method.density, "split": fitted.split, "tried": tried}


def _show(method: str, fit: dict[str, Any]) -> None:
    made = titled_table(
        f"{method} at {fit['density']:g}: split {fit['split']:g} is best",
        [],
        ["split", "input density", "hidden density", "perplexity"],
    )
    for row in fit["tried"]:
        made.add_row(
            f"{row['split']:g}",
            f"{row['input_density']:.3f}",
            f"{row['hidden_density']:.3f}",
            f"{row['perplexity']:.2f}",
            style="bold" if row["split"] == fit["split"] else None,
        )
    out.print(made)
