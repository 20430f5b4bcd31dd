"""A decoder that reads and extends a KV cache, as ONNX Runtime is given one: names and shapes are those of optimum.

    input_ids, position_ids          int64[batch, time]
    attention_mask                   int64[batch, past + time], 0 at padding, which is on the left
    past_key_values.N.key, .value    float32[batch, key-value heads, past, head_dim], of layer N
    logits                           float32[batch, time, vocabulary]
    present.N.key, .value            float32[batch, key-value heads, past + time, head_dim]

One graph serves the prompt, with `past` 0, and every token after it.
"""

from typing import Any

import jax
from flax import nnx
from jax import export

from mpq.export.jaxprs import shape_of, trace_open
from mpq.export.orbax import Exported
from mpq.models import FAMILIES, find_family, functional
from mpq.models.decoders import Cache, Decoder
from mpq.onnx.graph import Tensor
from mpq.types import MpqError, Params


def traced(exported: Exported) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The jaxpr of a decoder with its cache for any batch, and any number of tokens before; inputs and outputs.

    Raises:
      MpqError: the model is no decoder, or depends on a length otherwise than by sums and products.
    """
    family = find_family(exported.config, FAMILIES)
    module = nnx.eval_shape(lambda: family.build(family.parse(exported.config)))
    if not isinstance(module, Decoder):
        raise MpqError("a KV cache is one of language models, which this model is not: leave out --kv-cache")
    config, (apply, _) = module.config, functional(module)
    limits = ["batch >= 1", "time >= 1", "past >= 0", f"past + time <= {config.max_position_embeddings}"]
    batch, time, past = export.symbolic_shape("batch, time, past", constraints=limits)
    tokens, whole = (batch, time), (batch, past + time)
    heads = lambda length: (batch, config.num_key_value_heads, length, config.head_dim)
    names = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    inputs = [Tensor("input_ids", tokens, "int64"), Tensor("attention_mask", whole, "int64")]
    inputs += [Tensor("position_ids", tokens, "int64")]
    inputs += [Tensor(f"past_key_values.{name}", heads(past), "float32") for name in names]

    def step(params: Params, tokens: jax.Array, mask: jax.Array, positions: jax.Array, *given: jax.Array) -> Any:
        cache = Cache(positions, mask, list(zip(given[::2], given[1::2], strict=True)))
        logits = apply(params, tokens, cache)
        return logits, *(array for pair in cache.present for array in pair)

    dtypes = ["int32" if tensor.dtype == "int64" else tensor.dtype for tensor in inputs]
    structs = [jax.ShapeDtypeStruct(tensor.shape, dtype) for tensor, dtype in zip(inputs, dtypes, strict=True)]
    closed = trace_open(step, exported.structs, structs, "batches or lengths, which one ONNX graph cannot")
    outputs = [Tensor("logits", shape_of(closed.jaxpr.outvars[0]), "float32")]
    return closed, inputs, [*outputs, *(Tensor(f"present.{name}", heads(past + time), "float32") for name in names)]
