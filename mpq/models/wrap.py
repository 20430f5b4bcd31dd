"""Any model, unchanged, as a pure function of a flat dictionary of parameters.

A Linen module with its variables, an NNX module, or a function of a pytree of parameters (Equinox and Haiku models are
that). Nothing is asked of the model: no base class, no naming convention, no edit. What comes out feeds every stage,
and `Wrapped.unflatten` puts new values, such as dequantized weights, back into what the user passed.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import errors, nnx
from flax import linen as nn
from jax import numpy as jnp
from jax.tree_util import DictKey, KeyPath

from mpq.trace import Trace, trace
from mpq.types import MpqError, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Wrapped:
    """A model as a pure function.

    Attributes:
      apply: `(params, inputs) -> output`.
      params: path -> array, in the dtype that the model keeps it in.
    """

    apply: Callable[[Params, Any], Any]
    params: dict[str, jax.Array]
    _unflatten: Callable[[Params], Any] = dataclasses.field(repr=False)

    def trace(self, inputs: Any) -> Trace:
        """The weights of the model, found for inputs of these shapes.

        Args:
          inputs: what `apply` takes; arrays or `ShapeDtypeStruct`s.
        """
        return trace(self.apply, self.params, inputs)

    def unflatten(self, params: Params) -> Any:
        """What the user passed, with these values: the variables, a new NNX module, or the pytree.

        Args:
          params: path -> array, for every path of `self.params`.

        Raises:
          MpqError: a path is missing or unknown, or an array has another shape.
        """
        return self._unflatten(params)


def wrap(model: Any, variables: Any = None, /, **call: Any) -> Wrapped:
    """A model as a pure function of its parameters by path.

    Paths join the names on the way to an array with dots: `layers.0.kernel`. The model's arrays may be
    `ShapeDtypeStruct`s; then it can be traced, not run.

    Args:
      model: a Linen module, an NNX module, or a function `(params, inputs) -> output`.
      variables: of a Linen module all collections, as `init` returns them; of a function its parameters, any pytree
        (leaves that are no arrays stay as they are); of an NNX module nothing.
      **call: keyword arguments of the call: `train=False`, `method="encode"`, `rngs={...}`.

    Returns:
      The wrapped model. A tuple of inputs is handed to a module as positional arguments. Of a Linen module, the paths
      of collections other than `params` start with the collection: `batch_stats/norm.mean`; all are evaluated as they
      are, none is updated. An NNX module is copied and set to evaluation (`Module.eval`): its dropout does nothing, its
      batch statistics are frozen, its random state is fixed and no parameter.

    Raises:
      MpqError: the model is none of these, parameters are missing, or two of them have one path. `apply` raises it
        where a Linen module wants a random stream or updates a collection in this call.
    """
    if isinstance(model, nn.Module):
        return _linen(model, variables, call)
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise MpqError(f"An NNX module holds its parameters: pass {type(model).__name__} alone to `wrap`.")
        return _nnx(model, call)
    if not callable(model):
        raise MpqError(
            "`wrap` takes a Linen module, an NNX module or a function `(params, inputs)`, not a "
            f"{type(model).__name__}."
        )
    if variables is None:
        raise MpqError("A function is wrapped together with its parameters: `wrap(fn, params)`.")
    tree = _Tree(variables, _dotted)
    return Wrapped(lambda params, inputs: model(tree.fill(params), inputs, **call), tree.params, tree.fill)


def _linen(module: nn.Module, variables: Any, call: Mapping[str, Any]) -> Wrapped:
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise MpqError(
            "A Linen module is wrapped with all its variables, {'params': ..., ...}, as `init` returns them."
        )
    tree, name = _Tree(variables, _linen_name, nn.meta.AxisMetadata), type(module).__name__

    def apply(params: Params, inputs: Any) -> Any:
        try:
            return module.apply(tree.fill(params), *_positional(inputs), **call)
        except errors.InvalidRngError as error:
            raise MpqError(
                f"{name} draws random numbers in this call: make it deterministic with its own argument, for example "
                "`wrap(module, variables, train=False)`, or fix them with `rngs={'dropout': key}`."
            ) from error
        except errors.ModifyScopeVariableError as error:
            raise MpqError(
                f"{name} updates a collection in this call, such as batch statistics: use its own argument for "
                "evaluation, for example `wrap(module, variables, train=False)`."
            ) from error

    return Wrapped(apply, tree.params, tree.fill)


def _nnx(module: nnx.Module, call: Mapping[str, Any]) -> Wrapped:
    graph, random, state = nnx.split(module, nnx.RngState, ...)
    tree = _Tree(state, _dotted, nnx.Variable)
    copy = nnx.merge(graph, random, state, copy=True)
    copy.eval()
    evaluated = nnx.graphdef(copy)
    options = dict(call)
    method = options.pop("method", "__call__")

    def apply(params: Params, inputs: Any) -> Any:
        model = nnx.merge(evaluated, random, tree.fill(params), copy=True)
        if callable(method):
            return method(model, *_positional(inputs), **options)
        return getattr(model, method)(*_positional(inputs), **options)

    return Wrapped(apply, tree.params, lambda params: nnx.merge(graph, random, tree.fill(params), copy=True))


class _Tree:
    """A pytree, and the paths of its arrays.

    `name` makes a path of keys a parameter's path. `box` is a type of node around a value, whose field has no part in
    the path: Linen's metadata, an NNX variable.
    """

    def __init__(self, tree: Any, name: Callable[[KeyPath], str], box: type | tuple[type, ...] = ()):
        self._structure = jax.tree.structure(tree)
        self._leaves: list[tuple[str, Any]] = []
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, box)):
            for rest, leaf in jax.tree_util.tree_leaves_with_path(node):  # `rest[0]` is the box's own field
                self._leaves.append((name((*path, *rest[1:])), leaf))
        arrays = [(path, leaf) for path, leaf in self._leaves if _is_array(leaf)]
        if repeated := [path for path, count in Counter(path for path, _ in arrays).items() if count > 1]:
            raise MpqError(f"Two parameters have the path `{repeated[0]}`: rename one of them.")
        self.params = {path: jnp.asarray(a) if isinstance(a, np.ndarray) else a for path, a in arrays}

    def fill(self, params: Params) -> Any:
        """The tree with the arrays `params`."""
        if params.keys() != self.params.keys():
            missing, extra = sorted(self.params.keys() - params.keys()), sorted(params.keys() - self.params.keys())
            raise MpqError(f"The parameters are not those of the model: missing {missing}, not expected {extra}.")
        for path, old in self.params.items():
            if (new := np.shape(params[path])) != old.shape:
                raise MpqError(f"Parameter `{path}` has shape {old.shape} in the model, not {new}.")
        return self._structure.unflatten([params[path] if _is_array(leaf) else leaf for path, leaf in self._leaves])


def _positional(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _dotted(path: KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "params"


def _linen_name(path: KeyPath) -> str:
    assert isinstance(path[0], DictKey)
    rest = _dotted(path[1:])
    return rest if path[0].key == "params" else f"{path[0].key}/{rest}"
