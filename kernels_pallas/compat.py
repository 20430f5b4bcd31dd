"""What differs between JAX 0.10 and 0.11, or needs an import that may fail, wrapped once."""

from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu


def tpu_scratch(shape: tuple[int, ...], dtype: Any) -> Any:
    """A scratch array in vector memory."""
    return pltpu.VMEM(shape, dtype)


def tpu_params(semantics: tuple[Any, ...]) -> Any:
    """Compiler parameters of a TPU kernel: which axes of the grid may run in any order."""
    return pltpu.CompilerParams(dimension_semantics=semantics)


def tpu_interpreter() -> Any:
    """What makes `pallas_call` run a TPU kernel on a CPU: memories, copies and the grid as on the chip."""
    return pltpu.InterpretParams()


def device_kind(platform: str) -> str:
    """Kind of the first device of a platform as JAX calls it; the platform itself where there is none here."""
    return jax.devices()[0].device_kind if jax.default_backend() == platform else platform
