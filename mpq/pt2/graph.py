"""A graph of PyTorch under construction: nodes, stored tensors, and dimensions that are known only when it runs.

Nodes are calls of PyTorch's functions in a `torch.fx.Graph`. `torch.export` then records which operators of ATen they
come to: `Graph.program` is that, without where in which file each call was made, and `Graph.file` writes it.
"""

import importlib
import io
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mpq.export.jaxprs import arithmetic
from mpq.types import MpqError

OLDEST = 2, 9
"""Version of PyTorch from which on files are written so."""

EXTRA = "mpq.json"
"""Name of the text that goes with the program."""

_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Neg": operator.neg,
}


class Graph:
    """Nodes and stored tensors."""

    def __init__(self, torch: Any) -> None:
        """Start empty.

        Args:
          torch: the package.
        """
        self.torch = torch
        self.symbols: dict[str, Any] = {}
        self._module, self._graph = torch.nn.Module(), torch.fx.Graph()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Any] = {}
        self._dims: dict[str, Any] = {}
        self.known: dict[Any, np.ndarray] = {}
        """Nodes of constants -> their values."""

    def input(self, name: str) -> Any:
        """A node for the input of the model."""
        return self._graph.placeholder(name)

    def one(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Add a call of a function."""
        return self._graph.call_function(function, args, kwargs)

    def cast(self, value: Any, dtype: str) -> Any:
        """`value` in a dtype."""
        return self._graph.call_method("to", (value, self.dtype(dtype)))

    def dtype(self, name: str) -> Any:
        """Of PyTorch, by the name that NumPy has for it."""
        return getattr(self.torch, name)

    def store(self, name: str, array: np.ndarray) -> Any:
        """A tensor of the file, by a dotted name."""
        *folders, leaf = name.split(".")
        module = self._module
        for folder in folders:
            if not hasattr(module, folder):
                module.add_module(folder, self.torch.nn.Module())
            module = getattr(module, folder)
        module.register_buffer(leaf, self._tensor(array))
        return self._graph.get_attr(name)

    def constant(self, value: Any, dtype: Any = None) -> Any:
        """A small tensor that the computation needs: one number is made where it is used, more are stored once."""
        array = np.asarray(value, dtype)
        key = array.dtype.name, array.shape, array.tobytes()
        if key not in self._constants:
            if array.size == 1:
                number, shape = array.reshape(-1)[0].item(), array.shape
                made = self.one(self.torch.full, shape, number, dtype=self.dtype(array.dtype.name))
            else:
                made = self.store(f"constants.c{len(self._constants)}", array)
            self._constants[key], self.known[made] = made, array
        return self._constants[key]

    def dim(self, dim: Any) -> Any:
        """One dimension: a number, or a node."""
        if isinstance(dim, int | np.integer):
            return int(dim)
        if str(dim) not in self._dims:
            operation = lambda kind, *values: self.one(_ARITHMETIC[kind], *values)
            self._dims[str(dim)] = arithmetic(dim, self.symbols, int, operation, "PyTorch")
        return self._dims[str(dim)]

    def shape(self, dims: Sequence[Any]) -> list[Any]:
        """Dimensions."""
        return [self.dim(dim) for dim in dims]

    def program(self, result: Any, example: Any, dims: Mapping[int, tuple[str, int, int | None]]) -> Any:
        """What `torch.export` records of it.

        Args:
          result: the output of the model.
          example: an input.
          dims: open axes of the input -> name, least and largest size.
        """
        torch = self.torch
        self._graph.output(result)
        module = torch.fx.GraphModule(self._module, self._graph, "Model")
        open_dims = {axis: torch.export.Dim(name, min=low, max=high) for axis, (name, low, high) in dims.items()}
        program = torch.export.export(module, (example,), dynamic_shapes=(open_dims,), strict=False)
        for node in list(program.graph.nodes):
            if node.target == torch.ops.aten._assert_tensor_metadata.default:  # dtypes that no input can change
                program.graph.erase_node(node)
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom"):
                node.meta.pop(key, None)
        program.graph_module.recompile()
        return program

    def file(self, program: Any, extra: str) -> bytes:
        """The program as a `.pt2` file, with a text for `load`; equal programs give equal bytes."""
        written = io.BytesIO()
        self.torch.export.save(program, written, extra_files={EXTRA: extra})
        return written.getvalue()

    def _tensor(self, array: np.ndarray) -> Any:
        """Copied; dtypes that NumPy has by another package through their bytes."""
        array = np.array(array, order="C")
        if array.dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu):
            raw = self.torch.from_numpy(array.view(f"int{8 * array.itemsize}"))
            return raw.view(self.dtype(array.dtype.name))
        return self.torch.from_numpy(array)


def require_torch() -> Any:
    """The `torch` package.

    Raises:
      MpqError: it is not installed, or is too old.
    """
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers quantize_per_tensor and its kind
    except ImportError as error:
        raise MpqError("programs of torch.export are written by the package torch: pip install 'mpq[torch]'") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        raise MpqError(
            f"torch {torch.__version__} writes other files than torch {'.'.join(map(str, OLDEST))} and later: "
            "pip install --upgrade 'mpq[torch]'"
        )
    return torch
