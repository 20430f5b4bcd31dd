"""Reads the tensors of a quantized checkpoint as if they were plain: what `load` takes from the hub."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpq.hf.container import Inputs, Reader
from mpq.hf.containers import reader_of
from mpq.models.tensors import Header, Tensors
from mpq.quantize.candidates import dequantize
from mpq.types import MpqError, QTensor, Scheme


class QuantizedTensors:
    """`Tensors` in which every quantized module has a `weight`, `[n, k]`, that is dequantized when it is read.

    Raises:
      MpqError: the quantization method is not read, or no module is quantized.
    """

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]):
        self.folder: Path = tensors.folder
        self._tensors, self._reader = tensors, reader_of(config)
        self._modules = _modules(tensors.names, self._reader)
        if not self._modules:
            raise MpqError(f"{self.folder} holds no quantized tensor, and its config has a quantization_config")
        parts = {f"{m}.{end}" for m in self._modules for end in self._reader.ends}
        self._names = frozenset((tensors.names - parts) | {f"{module}.weight" for module in self._modules})

    @property
    def names(self) -> frozenset[str]:
        """Of all tensors, those of a quantized module as one."""
        return self._names

    def header(self, name: str) -> Header:
        """Shape of one tensor; its dtype, of a quantized one that of the scales."""
        if (module := self._module(name)) is None:
            return self._tensors.header(name)
        scheme, n, k = self._describe(module)
        return Header((n, k), scheme.scale_dtype)

    def slabs(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """One tensor in slabs; a quantized one whole, in float32."""
        if self._module(name) is None:
            yield from self._tensors.slabs(name)
        else:
            yield slice(None), np.asarray(dequantize(self.qtensor(name)))[0].T

    def scheme(self, name: str) -> Scheme | None:
        """How one tensor is stored; None of a plain one."""
        module = self._module(name)
        return None if module is None else self._describe(module)[0]

    def qtensor(self, name: str) -> QTensor:
        """The codes of one quantized tensor, as the matrix `[1, k, n]`.

        Raises:
          MpqError: its parts do not go together.
        """
        module = self._module(name)
        assert module is not None
        parts = {end: self._read(f"{module}.{end}") for end in self._reader.ends if self._has(module, end)}
        try:
            return self._reader.unpack(module, parts)
        except MpqError as error:
            raise MpqError(f"{module} of {self.folder}: {error}") from error
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise MpqError(f"{module} of {self.folder} is not as its config says ({error}): damaged?") from error

    @property
    def rounds_inputs(self) -> bool:
        """Whether runtimes round what some quantized tensor is multiplied with. Raises as `inputs` does."""
        return any(self.inputs(f"{module}.weight") is not None for module in sorted(self._modules))

    def inputs(self, name: str) -> Inputs:
        """How what one quantized tensor is multiplied with is rounded, and its range.

        Raises:
          MpqError: a range is missing, or none of ours.
        """
        module = self._module(name)
        assert module is not None
        try:
            return self._reader.inputs(module, lambda end: self._read(f"{module}.{end}"))
        except MpqError as error:
            raise MpqError(f"{module} of {self.folder}: {error}") from error
        except (KeyError, ValueError) as error:
            raise MpqError(f"{module} of {self.folder} is not as its config says ({error}): damaged?") from error

    def _module(self, name: str) -> str | None:
        module, _, end = name.rpartition(".")
        return module if end == "weight" and module in self._modules else None

    def _describe(self, module: str) -> tuple[Scheme, int, int]:
        def header(end: str) -> tuple[tuple[int, ...], str]:
            return self._tensors.header(f"{module}.{end}")

        try:
            return self._reader.describe(module, header, lambda end: self._read(f"{module}.{end}"))
        except (KeyError, ValueError, TypeError) as error:
            raise MpqError(f"{module} of {self.folder} is not as its config says ({error}): damaged?") from error

    def _has(self, module: str, end: str) -> bool:
        return f"{module}.{end}" in self._tensors.names

    def _read(self, name: str) -> np.ndarray:
        slabs = [slab for _, slab in self._tensors.slabs(name)]
        return np.concatenate(slabs) if slabs[0].ndim else slabs[0]


def split_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """The model's config, and what it says of quantization."""
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    return plain, config.get("quantization_config") or config.get("compression_config")


def _modules(names: frozenset[str], reader: Reader) -> frozenset[str]:
    ends = tuple(f".{mark}" for mark in reader.marks)
    return frozenset(n.removesuffix(end) for n in names for end in ends if n.endswith(end))
