"""The best of several rounding algorithms, by the layer loss.

Which algorithm leaves the smallest error of a layer's output differs from weight to weight and scheme to scheme, and
output columns do not depend on each other: so each column takes the codes and scales of the one whose loss
eT gram e is smallest. The result is stored as that of any of them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mpq.quantize.gptq import GPTQ
from mpq.quantize.hqq import HQQ
from mpq.quantize.loss import better
from mpq.quantize.rtn import RTN
from mpq.quantize.signround import SignRound
from mpq.quantize.widths import common, with_width
from mpq.types import MpqError, QTensor, Scheme

_ALL = (SignRound(), GPTQ(act_order=True))


@dataclasses.dataclass(frozen=True)
class Best:
    """Every output column by the member that leaves the smallest layer loss, the first of equals.

    So the layer loss is never above that of the first member. The others are asked in turn: where a scheme lets all
    columns of a matrix share a scale, a member that chose another one than the first cannot be mixed with it, and is
    left out of that matrix. Without a gram, or a scale, it is the first member.

    Attributes:
      members: at least one; what `scale` and `data_aware` say is said of the first.
    """

    members: tuple[RTN | GPTQ | HQQ | SignRound, ...] = _ALL

    def __post_init__(self) -> None:
        if not self.members:
            raise MpqError("best of no rounding algorithm: give at least one, such as GPTQ()")

    @property
    def name(self) -> str:
        """`best`."""
        return "best"

    @property
    def data_aware(self) -> bool:
        """Always."""
        return True

    @property
    def scale(self) -> str:
        """How the first member chooses its scales; those of HQQ start from absmax."""
        return getattr(self.members[0], "scale", "absmax")

    def __call__(self, w: jax.Array, scheme: Scheme, gram: jax.Array | None = None) -> QTensor:
        """Quantize `w`.

        Args:
          w: `float32[batch, k, n]`, finite.
          scheme: any scheme.
          gram: `float32[batch, k, k]`, E[x xT], finite and positive semidefinite; or None.
        """
        result = self.members[0](w, scheme, gram)
        if gram is None or not scheme.has_scale:
            return result
        for member in self.members[1:]:
            form, width = common(scheme)
            pair = (dataclasses.replace(q, scheme=form) for q in (member(w, scheme, gram), result))
            result = dataclasses.replace(_better(*pair, w, gram, width), scheme=scheme)
        return result


@jax.jit
def _better(new: QTensor, old: QTensor, w: jax.Array, gram: jax.Array, width: jax.Array | None) -> QTensor:
    """`new` where it is better and what columns share is the same, else `old`."""
    form, scheme = old.scheme, with_width(old.scheme, width)
    with_scheme = lambda q: dataclasses.replace(q, scheme=scheme)
    got = better(with_scheme(new), with_scheme(old), w, gram)
    same = jnp.ones((len(w), 1, 1), bool)
    shared = [(new.tensor_scale, old.tensor_scale), (new.codebook, old.codebook)]
    if form.per_tensor:
        shared += [(new.scale, old.scale), (new.zero_point, old.zero_point)]
    for a, b in shared:
        if a is not None and b is not None:
            same &= (a == b).all(axis=(1, 2), keepdims=True)
    return dataclasses.replace(jax.tree.map(lambda a, b: jnp.where(same, a, b), got, with_scheme(old)), scheme=form)
