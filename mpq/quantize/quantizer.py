"""What a rounding algorithm is."""

from typing import Protocol

import jax

from mpq.types import QTensor, Scheme


class Quantizer(Protocol):
    """Frozen options. Pure; batched over the leading axis; weights of equal shape share a compilation."""

    @property
    def name(self) -> str:
        """Its name in `QUANTIZERS`."""
        ...

    @property
    def data_aware(self) -> bool:
        """Whether a gram changes what it returns."""
        ...

    def __call__(self, w: jax.Array, scheme: Scheme, gram: jax.Array | None = None) -> QTensor:
        """Quantize `w: float32[batch, k, n]`, with `gram: float32[batch, k, k]` = E[x xT] or without."""
        ...
