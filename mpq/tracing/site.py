"""`Site`: one operation that reads a weight, and what it reads and gives as matrices."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from mpq.tracing.layout import MatrixView, features_last
from mpq.tracing.reads import Patches, Read
from mpq.types import MpqError, Use, WeightSpec


@dataclasses.dataclass(frozen=True)
class Site:
    """One operation that reads a weight. Static and hashable.

    Attributes:
      id: its number in the order of execution, unique in a trace.
      spec: the weight.
      use: which of the weight's uses this is.
    """

    id: int
    spec: WeightSpec
    use: Use
    _read: Read = dataclasses.field(repr=False)

    @property
    def output(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the operation's output."""
        return self._read.output

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape whose row-major flattening is the `tokens` axis of the matrices."""
        return self._read.token_shape

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """Of `inputs_matrix`: batch, tokens and k."""
        return self.spec.batch, math.prod(self.token_shape), self.spec.k

    def inputs_matrix(self, x: jax.Array) -> jax.Array:
        """The operation's input as `[batch, tokens, k]`, such that `inputs_matrix(x) @ w[batch, k, n]` is its result.

        A convolution's tokens are its output positions, and a row is the window that it sees there. An embedding has
        indices instead: it raises `MpqError`.
        """
        if self._read.inputs is None:
            raise MpqError(f"`{self.spec.path}` is looked up by integer indices here; they have no matrix view.")
        return self._read.inputs(x)

    def value_view(self, shape: Sequence[int]) -> MatrixView:
        """The view of the operation's input, of this shape, as `[batch, positions, features]`, every value once.

        For a matmul it is that of `inputs_matrix`; a convolution's positions are those of its input, before windows are
        made of them. `invert` of the view is the way back. An embedding, which has indices instead, raises `MpqError`.
        """
        inputs = self._read.inputs
        if inputs is None:
            raise MpqError(f"`{self.spec.path}` is looked up by integer indices here; they are no values to view.")
        return features_last(shape, inputs.dimensions.lhs_spec[1]) if isinstance(inputs, Patches) else inputs

    def weights_matrix(self, w: jax.Array) -> jax.Array:
        """The weight, laid out as this operation gets it, as `[batch, k, n]`."""
        return self._read.weights(w)

    def outputs_matrix(self, y: jax.Array) -> jax.Array:
        """The operation's output as `[batch, tokens, n]`; an embedding's as `[1, tokens, k]`."""
        return self._read.outputs(y)

    def from_outputs_matrix(self, matrix: jax.Array) -> jax.Array:
        """Inverse of `outputs_matrix`: what a replacement computed as a matrix, in the shape that the model expects."""
        return self._read.outputs.invert(matrix)


def sole_input(spec: WeightSpec) -> str | None:
    """The value that all uses of a weight multiply; None where there are several, or uses of other kinds."""
    inputs = {use.input if use.kind == "matmul" else None for use in spec.uses}
    return inputs.pop() if len(inputs) == 1 else None
