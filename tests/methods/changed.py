"""Good files with one thing wrong."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel


def changed(made: BaseModel, path: list[Any], value: Any) -> dict[str, Any]:
    """The JSON of a good file with one thing else; a value of None removes it."""
    said: dict[str, Any] = json.loads(made.model_dump_json())
    place: Any = said
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return said
