"""Arrays that lie in a file without a name: for what grows with a text, which memory must not."""

from __future__ import annotations

import math
import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dipnet.errors import InputError


def scratch_array(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros of ``shape`` in a temporary file, which ends with the array.

    The operating system writes out what is not in use. The room is taken at once, since a disk
    that is full later would end the process. Raises InputError when there is no room.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size == 0:  # a file of no bytes cannot be mapped
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "w+", shape=shape).view(np.ndarray)
    except OSError as error:
        raise InputError(
            f"no room for {size} bytes in the folder for temporary files "
            f"({error.strerror or error}): free some, or set TMPDIR to another folder"
        ) from None
