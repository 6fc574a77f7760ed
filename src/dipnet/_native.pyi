import numpy as np
from numpy.typing import NDArray

def topk_mask(
    scores: NDArray[np.float32], mask: NDArray[np.bool_], k: int, threads: int
) -> None: ...
