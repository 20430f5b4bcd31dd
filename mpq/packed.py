"""A traced model on packed weights: its matmuls and convolutions read codes, and no float copy of them is kept.

    packed = pack_weights(traced.weights, qtensors)
    logits = jax.jit(partial(evaluate_packed, traced))(rest, packed, tokens)    # rest: parameters that are not packed

Every read of a packed weight becomes `kernels_pallas.quantized_matmul` on the weight's canonical view; a convolution
multiplies the windows that it sees, an embedding looks its rows up in the dequantized weight.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import LAYOUTS, Packed, dequantize, pack, quantized_matmul
from kernels_pallas.layouts import Spec
from mpq.formats.integer import Integer
from mpq.trace import Default, Site, Trace
from mpq.types import MpqError, NumberFormat, Params, QTensor, WeightSpec

MAX_TABLE_BITS = 4


def pack_weights(
    weights: Sequence[WeightSpec], qtensors: Mapping[str, QTensor], platform: str | None = None
) -> dict[str, Packed]:
    """Quantized weights as kernels read them.

    Args:
      weights: of the trace.
      qtensors: path -> quantized weight, of some or all of them.
      platform: `cpu`, `tpu` or `cuda`, whose layout is taken where it holds the weight, and `plain` elsewhere; None:
        where JAX runs.

    Returns:
      Path -> packed weight, `[batch, k, n]`, or `[k, n]` where the batch is 1.

    Raises:
      MpqError: a path is unknown, or a format is neither an integer nor a table of at most 16 levels.
    """
    known = {spec.path for spec in weights}
    if unknown := [path for path in qtensors if path not in known]:
        raise MpqError(f"{unknown[0]} is not one of the {len(known)} weights that were traced: trace the model again")
    layout = platform or jax.default_backend()
    return {path: _pack(path, qtensor, layout if layout in LAYOUTS else "plain") for path, qtensor in qtensors.items()}


def evaluate_packed(
    traced: Trace,
    params: Params,
    packed: Mapping[str, Packed],
    inputs: Any,
    *,
    activation_bits: int | None = None,
    backend: str = "auto",
) -> Any:
    """What the model returns with its weights packed. Pure: use it under `jit`.

    Args:
      traced: the model.
      params: parameters that are not packed, as traced; those that are packed as a whole may be missing.
      packed: path -> weight, from `pack_weights`.
      inputs: as traced.
      activation_bits: 8 rounds inputs of integer weights to int8 by token; None leaves them as they are.
      backend: as `quantized_matmul` takes it.

    Raises:
      MpqError: a parameter is missing; inputs or parameters differ from what was traced.
    """
    specs = [spec for spec in traced.weights if spec.path in packed]
    whole = dict(params)
    for path, shape in traced.params.items():
        held = sum(spec.size for spec in specs if spec.param == path)
        if path not in whole and held < shape.size:
            raise MpqError(f"parameter {path} is neither given nor packed as a whole: pass it among the parameters")
        if path not in whole:
            whole[path] = jnp.zeros(shape.shape, shape.dtype)
    for spec in specs:  # what only replaced reads would see is never computed: the compiler drops it
        matrix = dequantize(packed[spec.path]).reshape(spec.batch, spec.k, spec.n)
        whole = spec.write(whole, matrix)

    def replace(site: Site, x: jax.Array, w: jax.Array, default: Default) -> jax.Array:
        weight = packed.get(site.spec.path)
        if weight is None or site.use.kind == "embedding":
            return default(x, w)
        rows = site.inputs_matrix(x)
        rows = rows if weight.batch_shape else rows[0]
        bits = activation_bits if weight.levels is None else None
        y = quantized_matmul(rows, weight, activation_bits=bits, backend=backend, out_dtype=site.output.dtype)
        return site.from_outputs_matrix(y if weight.batch_shape else y[None])

    return traced.evaluate(whole, inputs, replace)


def _pack(path: str, qtensor: QTensor, layout: str) -> Packed:
    """One weight; a table's codes are counted from its lowest level."""
    scheme = qtensor.scheme
    number_format, scale = scheme.format, qtensor.effective_scale if scheme.has_tensor_scale else qtensor.scale
    levels = _levels(number_format)
    if scale is None or (levels is None and not isinstance(number_format, Integer)):
        raise MpqError(
            f"weight {path} is {scheme}: integers and tables of at most {2**MAX_TABLE_BITS} levels can be packed; "
            "leave it among the parameters"
        )
    codes = np.asarray(qtensor.qvalue) - np.int8(0 if levels is None else number_format.min_qvalue)
    batch, k, n = codes.shape
    zeros = None if qtensor.zero_point is None else np.asarray(qtensor.zero_point)
    zeros = None if zeros is None else np.broadcast_to(zeros, (*zeros.shape[:-1], n))
    group_size = None if scheme.group_size is None or scheme.group_size >= k else scheme.group_size
    one = (lambda array: array[0]) if batch == 1 else (lambda array: array)
    fits = LAYOUTS[layout].refuses(Spec(k, n, number_format.bits, group_size, levels)) is None
    return pack(
        one(codes),
        one(np.asarray(scale)),
        None if zeros is None else one(zeros),
        bits=number_format.bits,
        group_size=group_size,
        layout=layout if fits else "plain",
        levels=levels,
    )


def _levels(number_format: NumberFormat) -> tuple[float, ...] | None:
    """Values of all codes of a format that is no integer, lowest first; None if there are more than 16."""
    if isinstance(number_format, Integer) or number_format.bits > MAX_TABLE_BITS:
        return None
    codes = jnp.arange(number_format.min_qvalue, number_format.max_qvalue + 1, dtype=jnp.int8)
    return tuple(map(float, number_format.decode(codes)))
