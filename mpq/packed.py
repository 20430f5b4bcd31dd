"""A traced model on packed weights: its matmuls and convolutions read codes, and no float copy of them is kept.

    packed = pack_weights(traced.weights, qtensors)
    logits = jax.jit(partial(evaluate_packed, traced))(rest, packed, tokens)    # rest: parameters that are not packed

Every read of a packed weight becomes `kernels_pallas.quantized_matmul` on the weight's canonical view. An embedding
looks its rows up in the dequantized weight. A convolution of integers multiplies the windows that it sees; one of
floats is XLA's own with the dequantized weight, which all positions share.

With activations rounded as a plan says, the operands are the codes of both, int8, and sums are int32, where that is a
product of integers: weights of integers and a symmetric scheme of integers, of a whole tensor, or of tokens or groups
of features that a matmul reads (a convolution adds up positions, whose scales would differ; groups of features and of
the weight's rows have to nest). Elsewhere rounded values are multiplied in floating point.
What a scheme with outliers leaves in floating point is multiplied by the dequantized weight and added, where there is
any.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import LAYOUTS, Packed, dequantize, grouped_matmul, pack, quantized_matmul, segment_size
from kernels_pallas.dispatch import own_layout
from kernels_pallas.layouts import Spec
from mpq.activations.apply import RoundedActivation
from mpq.formats.integer import Integer
from mpq.trace import Default, Site, Trace
from mpq.types import MpqError, Params, QTensor, WeightSpec

Multiply = Callable[..., jax.Array]
"""`quantized_matmul` on the backend and platform that were asked for."""

MAX_TABLE_BITS = 4

MOST_PADDED = 1.25
"""How many times its own elements a weight may take in Hopper's tiles."""


def pack_weights(
    weights: Sequence[WeightSpec], qtensors: Mapping[str, QTensor], platform: str | None = None
) -> dict[str, Packed]:
    """Quantized weights as kernels read them.

    Args:
      weights: of the trace.
      qtensors: path -> quantized weight, of some or all of them.
      platform: `cpu`, `tpu` or `cuda`, whose layout is taken where it holds the weight without much padding, and
        `plain` elsewhere; None: where JAX runs.

    Returns:
      Path -> packed weight, `[batch, k, n]`, or `[k, n]` where the batch is 1.

    Raises:
      MpqError: a path is unknown, or a format is neither an integer nor a table of at most 16 levels, one for all
        matrices of a batch.
    """
    known = {spec.path for spec in weights}
    if unknown := [path for path in qtensors if path not in known]:
        raise MpqError(f"{unknown[0]} is not one of the {len(known)} weights that were traced: trace the model again")
    layout = own_layout(platform or jax.default_backend())
    return {path: _pack(path, qtensor, layout) for path, qtensor in qtensors.items()}


def evaluate_packed(
    traced: Trace,
    params: Params,
    packed: Mapping[str, Packed],
    inputs: Any,
    *,
    activation_bits: int | None = None,
    activations: Sequence[RoundedActivation] = (),
    backend: str = "auto",
    platform: str | None = None,
) -> Any:
    """What the model returns with its weights packed. Pure: use it under `jit`.

    Args:
      traced: the model.
      params: parameters that are not packed, as traced; those that are packed as a whole may be missing.
      packed: path -> weight, from `pack_weights`.
      inputs: as traced.
      activation_bits: 8 rounds inputs of integer weights to int8 by token; None leaves them as they are.
      activations: rows that a plan rounds, with their static ranges; for them `activation_bits` says nothing.
      backend: as `quantized_matmul` takes it.
      platform: likewise.

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

    read = {one.spec.at: one for one in activations if one.spec.kind == "activation"}
    cached = {one.spec.at: one for one in activations if one.spec.kind == "kv"}
    windows = traced.inputs.shape[0] if activations else 1
    multiply = functools.partial(quantized_matmul, backend=backend, platform=platform)

    def replace(site: Site, x: jax.Array, w: jax.Array, default: Default) -> jax.Array:
        if site.use.kind == "embedding":
            return default(x, w)
        weight, row = packed.get(site.spec.path), read.get(site.use.input)
        codes = scale = None
        if row is not None and weight is not None and _is_integer_product(site, weight, row):
            if row.scheme.group_size:
                return _product_of_groups(site, x, row, windows, weight)
            codes, scale = _codes(site, x, row, windows)
        elif row is not None:
            view = site.value_view(x.shape)
            x = view.invert(row(view(x), windows))
        bits = activation_bits if weight is not None and weight.levels is None and row is None else None
        if weight is None or (site.use.kind == "conv" and bits is None and codes is None):
            y = default(x, w)
        else:
            one = (lambda array: array) if weight.batch_shape else (lambda array: array[0])
            rows = one(site.inputs_matrix(x) if codes is None else codes)
            beside = None if codes is None or row is None else _outliers(site, x, row, windows)
            y = multiply(
                rows,
                weight,
                activation_bits=bits,
                activation_scale=None if scale is None else one(scale),
                out_dtype=site.output.dtype if beside is None else jnp.float32,
            )
            if beside is not None:
                y = _add_outliers(y, one(beside), weight, multiply).astype(site.output.dtype)
            y = site.from_outputs_matrix(y if weight.batch_shape else y[None])
        if (part := cached.get(site.spec.path)) is not None:
            y = site.from_outputs_matrix(part(site.outputs_matrix(y), windows))
        return y

    return traced.evaluate(whole, inputs, replace)


def _is_integer_product(site: Site, weight: Packed, row: RoundedActivation) -> bool:
    """Whether one scale of the input and one of every group of the weight stand before each sum of products."""
    scheme, matmul = row.scheme, site.use.kind == "matmul"
    if weight.levels is not None or scheme.asymmetric or scheme.minifloat:
        return False
    if scheme.group_size:
        return matmul and segment_size(weight, scheme.group_size) is not None
    return scheme.granularity == "tensor" or (matmul and scheme.granularity == "token")


def _product_of_groups(site: Site, x: jax.Array, row: RoundedActivation, windows: int, weight: Packed) -> jax.Array:
    """The output of a matmul, its input with a scale for every group of features."""
    codes, scale = row.quantize(site.inputs_matrix(x), windows)
    codes = codes.reshape(*codes.shape[:2], -1)[..., : weight.k].astype(jnp.int8)
    scale = scale[..., 0]
    one = (lambda array: array) if weight.batch_shape else (lambda array: array[0])
    y = grouped_matmul(one(codes), one(scale), weight, row.scheme.group_size).astype(site.output.dtype)
    return site.from_outputs_matrix(y if weight.batch_shape else y[None])


def _codes(site: Site, x: jax.Array, row: RoundedActivation, windows: int) -> tuple[jax.Array, jax.Array]:
    """Codes `int8[batch, tokens, k]` of the operation's input, and their scales `[batch, tokens or 1, 1]`."""
    view = site.value_view(x.shape)
    codes, scale = row.quantize(view(x), windows)
    rows = site.inputs_matrix(view.invert(codes.reshape(view.shape).astype(jnp.int8)))  # what pads windows is code 0
    scale = scale.reshape(*scale.shape[:2], 1)
    repeats = rows.shape[1] // scale.shape[1]
    return rows, scale if scale.shape[1] == 1 else jnp.repeat(scale, repeats, axis=1)


def _outliers(site: Site, x: jax.Array, row: RoundedActivation, windows: int) -> jax.Array | None:
    """`[batch, tokens, k]` of what has no codes, 0 elsewhere; None where there can be none."""
    if not row.scheme.threshold or row.columns == ():
        return None
    view = site.value_view(x.shape)
    return site.inputs_matrix(view.invert(row.outliers(view(x), windows)))


def _add_outliers(y: jax.Array, outliers: jax.Array, weight: Packed, multiply: Multiply) -> jax.Array:
    """`float32[..., n]`: `y` and the product of outliers with the dequantized weight, computed where there are any."""
    product = lambda: multiply(outliers, weight, out_dtype=jnp.float32)
    return jax.lax.cond(jnp.any(outliers != 0), lambda: y + product(), lambda: y)


def _pack(path: str, qtensor: QTensor, layout: str) -> Packed:
    """One weight; a table's codes are counted from its lowest level."""
    qtensor.require_neighbours(path)
    scheme = qtensor.scheme
    number_format, scale = scheme.format, qtensor.effective_scale if scheme.has_tensor_scale else qtensor.scale
    levels = _levels(qtensor)
    if scale is None or (levels is None and not isinstance(number_format, Integer)):
        raise MpqError(
            f"weight {path} is {scheme}: integers and tables of at most {2**MAX_TABLE_BITS} levels, one for all "
            "matrices of a batch, can be packed; leave it among the parameters"
        )
    codes = np.asarray(qtensor.qvalue) - np.int8(0 if levels is None else number_format.min_qvalue)
    batch, k, n = codes.shape
    zeros = None if qtensor.zero_point is None else np.asarray(qtensor.zero_point)
    zeros = None if zeros is None else np.broadcast_to(zeros, (*zeros.shape[:-1], n))
    group_size = None if scheme.group_size is None or scheme.group_size >= k else scheme.group_size
    one = (lambda array: array[0]) if batch == 1 else (lambda array: array)
    spec = Spec(k, n, number_format.bits, group_size, levels)
    # Of a small weight, or of odd sizes, most of Hopper's tiles would be padding.
    full = layout != "hopper" or spec.tiled_k * spec.tiled_n <= MOST_PADDED * k * n
    fits = full and LAYOUTS[layout].refuses(spec) is None
    return pack(
        one(codes),
        one(np.asarray(scale)),
        None if zeros is None else one(zeros),
        bits=number_format.bits,
        group_size=group_size,
        layout=layout if fits else "plain",
        levels=levels,
    )


def _levels(qtensor: QTensor) -> tuple[float, ...] | None:
    """Values of all codes of a format that is no integer, lowest first; None where no short table holds them."""
    number_format = qtensor.scheme.format
    if qtensor.codebook is not None:
        tables = np.asarray(qtensor.codebook[..., 0], np.float32)
        return tuple(map(float, tables[0])) if (tables == tables[0]).all() else None
    if isinstance(number_format, Integer) or number_format.bits > MAX_TABLE_BITS or number_format.span > 1:
        return None
    codes = jnp.arange(number_format.min_qvalue, number_format.max_qvalue + 1, dtype=jnp.int8)
    return tuple(map(float, number_format.decode(codes)))
