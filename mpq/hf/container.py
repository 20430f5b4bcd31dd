"""What a container is: how one quantized matrix becomes named tensors of a checkpoint, and a config that says so."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from mpq.types import MpqError, QTensor, Scheme

Parts = Mapping[str, np.ndarray]
"""Arrays of one module by the end of their name: `weight_packed`, `qweight`."""


class Part(NamedTuple):
    """One tensor that a container stores for a module."""

    dtype: str
    shape: tuple[int, ...]


class Site(NamedTuple):
    """A weight as a checkpoint has it.

    Attributes:
      path: ours.
      module: name of the PyTorch module that holds it; `module.weight` is the tensor, `[n, k]`.
      kind: `WeightSpec.kind`.
      k, n: rows and columns of the matrix.
      head: whether its outputs are the model's.
    """

    path: str
    module: str
    kind: str
    k: int
    n: int
    head: bool


class Container(Protocol):
    """A way to store quantized matrices beside plain tensors. Frozen."""

    @property
    def name(self) -> str: ...
    @property
    def scale_dtype(self) -> str | None:
        """Dtype of all scales, where it is not the plan's."""
        ...

    @property
    def beside(self) -> Mapping[str, Parts]:
        """Path of a weight -> what its module holds beside it: how inputs are rounded."""
        ...

    def refusal(self, site: Site, scheme: Scheme) -> str | None:
        """Why this weight cannot be stored under a scheme that has a scale; None where it can."""
        ...

    def parts(self, scheme: Scheme, k: int, n: int) -> dict[str, Part]:
        """Tensors of one matrix."""
        ...

    def pack(self, qtensor: QTensor) -> dict[str, np.ndarray]:
        """The same with their content."""
        ...

    def config(self, modules: Mapping[str, Scheme], sites: Mapping[str, Site]) -> dict[str, Any]:
        """`quantization_config` of the checkpoint's `config.json`; plain floats are among the schemes."""
        ...

    def reader(self, config: Mapping[str, Any]) -> "Reader":
        """What reads a checkpoint with this `quantization_config`."""
        ...


Read = Callable[[str], np.ndarray]
"""One tensor of a module, by the end of its name."""
Shape = Callable[[str], tuple[tuple[int, ...], str]]
"""Shape and dtype of one of them, without reading it; raises `KeyError` where it is missing."""


Inputs = tuple[str, np.ndarray | None] | None
"""Activation scheme and range; None where inputs stay as they are."""
NOTHING: Mapping[str, Parts] = MappingProxyType({})


class Reader(NamedTuple):
    """Reads the modules of one checkpoint.

    Attributes:
      marks: ends of names that say that a module is quantized.
      ends: of all names that belong to such a module.
      describe: module, shapes and small tensors -> scheme, `n`, `k`; reads no weights.
      unpack: module, arrays by the end of their name -> the matrix.
      inputs: module and small tensors -> how its inputs are rounded, and the ends of a static range, `float32[2, 1]`.
    """

    marks: tuple[str, ...]
    ends: tuple[str, ...]
    describe: Callable[[str, Shape, Read], tuple[Scheme, int, int]]
    unpack: Callable[[str, Parts], QTensor]
    inputs: Callable[[str, Read], "Inputs"] = lambda module, read: None


def unsigned(codes: Any, bits: int) -> np.ndarray:
    """Signed codes `int8[1, rows, columns]` as `uint8[rows, columns]`, the least of them 0."""
    return (np.asarray(codes)[0].astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)


def signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of `unsigned`."""
    return (codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)[None]


def uniform(name: str, modules: Mapping[str, Scheme], sites: Mapping[str, Site]) -> Scheme:
    """The one scheme of all modules that have scales.

    Raises:
      MpqError: they differ, or there is none.
    """
    found = {module: scheme for module, scheme in modules.items() if scheme.has_scale}
    if not found:
        raise MpqError(f"no weight of the plan is quantized, and {name} is for those: choose another plan")
    (first, scheme), *others = found.items()
    for module, other in others:
        if other != scheme:
            raise MpqError(
                f"{sites[module].path} at {other} and {sites[first].path} at {scheme}: {name} has one scheme for all "
                "linear layers; export mixed plans with --to hf"
            )
    return scheme


def plain_layers(modules: Mapping[str, Scheme], sites: Mapping[str, Site]) -> list[str]:
    """The linear layers that stay plain floats."""
    return [module for module, scheme in modules.items() if not scheme.has_scale and sites[module].kind == "matmul"]


def one_float(name: str, modules: Mapping[str, Scheme], sites: Mapping[str, Site]) -> None:
    """Refuse plain floats of several types, which `transformers` would leave as they are and cannot multiply then.

    Raises:
      MpqError: names two of them.
    """
    floats = {str(scheme): sites[module].path for module, scheme in modules.items() if not scheme.has_scale}
    if len(floats) > 1:
        (first, path), (other, second), *_ = floats.items()
        raise MpqError(
            f"{path} at {first} and {second} at {other}: {name} has one type for all plain floats; pin them to one"
        )
