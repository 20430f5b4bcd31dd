"""`Model`: a pure function, its parameters, and what is needed to feed it and to read its outputs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from mpq.files import digest_arrays
from mpq.inputs import Inputs
from mpq.models.decoders import DecoderConfig
from mpq.tasks import Task
from mpq.trace import Trace, trace
from mpq.types import Params, Scheme


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model, ready for every stage.

    Attributes:
      apply: `(params, inputs) -> outputs`, pure; inputs as `inputs` says, outputs as `task` reads them.
      params: path -> float32 array.
      stored: path -> dtype name in the checkpoint; what is left unquantized is written back in it.
      name: for a person.
      inputs: what it reads.
      task: what its outputs mean.
      config: the Hugging Face `config.json`, as read.
      tokenizer: or None.
      schemes: path -> scheme of the parameters that the checkpoint stores quantized, as those of GPTQ or AWQ do.
      decoder: of a language model whose `apply` takes `mpq.models.decoders.Cache` or `Slots` behind its inputs.
    """

    apply: Callable[[Params, jax.Array], jax.Array]
    params: dict[str, jax.Array]
    stored: Mapping[str, str]
    name: str
    inputs: Inputs
    task: Task
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    schemes: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)
    decoder: DecoderConfig | None = None

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over all parameters, computed once."""
        return digest_arrays({path: np.asarray(param) for path, param in self.params.items()})

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, tied ones once."""
        return sum(int(np.prod(p.shape)) for p in self.params.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters in the dtypes they were stored in."""
        return sum(int(np.prod(p.shape)) * jnp.dtype(self.stored[path]).itemsize for path, p in self.params.items())

    def trace(self, batch: int = 1, window: int | None = None) -> Trace:
        """The model's `Trace` on `batch` inputs; of text, `window` tokens each (default: the whole context)."""
        return trace(self.apply, self.params, self.inputs.struct(batch, window))


def functional(module: nnx.Module) -> tuple[Callable[..., jax.Array], dict[str, jax.Array]]:
    """An NNX module as `(apply, params)` with parameters by dotted path.

    Works on abstract modules too (`nnx.eval_shape`); then the parameters are `ShapeDtypeStruct`s.
    """
    graph, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    paths = [".".join(map(str, path)) for path, _ in flat]

    def apply(params: Params, *inputs: Any) -> jax.Array:
        leaves = [(path, var.replace(params[name])) for name, (path, var) in zip(paths, flat, strict=True)]
        return nnx.merge(graph, nnx.from_flat_state(leaves))(*inputs)

    return apply, {name: var.get_value() for name, (_, var) in zip(paths, flat, strict=True)}
