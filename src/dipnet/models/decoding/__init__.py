"""Decoding on a GPU that reads only the weights that the masks keep.

Where a call brings one token, the products at a method's sites are those of `dipnet.kernels.gpu`:
in Hugging Face's modules (`modules`), which a compiler may take whole, and in a decode loop of our
own (`token`, `graph`, `loop`) behind the same ``generate()``, for the families that it knows.
"""

from dipnet.models.decoding.decoding import Decoding, why_not

__all__ = ["Decoding", "why_not"]
