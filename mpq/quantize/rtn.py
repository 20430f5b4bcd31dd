"""RTN: round every weight to the nearest level of its group."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mpq.formats.ggml import require_fit
from mpq.quantize import scales
from mpq.quantize.widths import common, with_width
from mpq.types import QTensor, Scheme


@dataclasses.dataclass(frozen=True)
class RTN:
    """Round to nearest. Float formats are cast.

    Attributes:
      scale: `absmax`, what the field calls RTN and needs no data; or `mse`, the scale of the smallest squared error of
        the group, each row weighted by its E[x^2] where a gram is given.
    """

    scale: str = "absmax"

    def __post_init__(self) -> None:
        scales.check_method(self.scale)

    @property
    def name(self) -> str:
        """`rtn`."""
        return "rtn"

    @property
    def data_aware(self) -> bool:
        """Only where scales are searched: a gram weighs the rows."""
        return self.scale != "absmax"

    def __call__(self, w: jax.Array, scheme: Scheme, gram: jax.Array | None = None) -> QTensor:
        """Quantize `w`.

        Args:
          w: `float32[batch, k, n]`, finite.
          scheme: any scheme.
          gram: `float32[batch, k, k]`, E[x xT], or None; only its diagonal is read.

        Raises:
          MpqError: `k` does not fill the blocks of the scheme.
        """
        require_fit(scheme, w.shape[-2])
        diagonal = None if gram is None else gram.diagonal(axis1=-2, axis2=-1)
        return dataclasses.replace(_rtn(w, diagonal, *common(scheme), self.scale), scheme=scheme)


@functools.partial(jax.jit, static_argnames=("scheme", "method"))
def _rtn(w: jax.Array, diagonal: jax.Array | None, scheme: Scheme, width: jax.Array | None, method: str) -> QTensor:
    weight = jnp.ones(w.shape[:-1]) if diagonal is None else scales.row_weight(diagonal)
    return dataclasses.replace(scales.quantize(w, with_width(scheme, width), method, weight), scheme=scheme)
