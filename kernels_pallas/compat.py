"""What differs between JAX 0.10 and 0.11, or needs an import that may fail, wrapped once."""

import importlib
import inspect
import re
from collections.abc import Callable
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
    """What makes `pallas_call` run a TPU kernel on a CPU: memories, copies and the grid as on the chip.

    Accesses are followed by vector clocks: two that race are printed, and `races_found` then says so.
    """
    return pltpu.InterpretParams(detect_races=True)


def races_found() -> bool | None:
    """Whether the kernel that was interpreted last accessed memory in an order that nothing fixes; None before any."""
    # 0.10 and 0.11 both keep it in this module, and neither has a public name for it.
    state = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    return None if state.races is None else state.races.races_found


def platform() -> str:
    """Where JAX runs: `cpu`, `tpu` or `cuda`, which JAX calls `gpu` here."""
    name = jax.default_backend()
    return "cuda" if name == "gpu" else name


def mosaic_gpu() -> Any:
    """The module of GPU kernels. It needs `absl-py`, which JAX does not ask for, so it is imported where it is used."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def load(ref: Any, layout: Any, shared: bool = True) -> jax.Array:
    """A tile of memory, shared or not, in registers."""
    # JAX 0.10 asks for an index beside the reference, JAX 0.11 warns of one.
    gpu = mosaic_gpu()
    index = inspect.signature(gpu.load).parameters.get("idx")
    needed = index is not None and index.default is inspect.Parameter.empty
    return gpu.load(ref, *([()] if needed else []), layout=layout, optimized=shared)


def device_kind(of: str) -> str:
    """Kind of the first device of a platform as JAX calls it; the platform itself where there is none here."""
    return jax.devices()[0].device_kind if platform() == of else of


def hopper() -> bool:
    """Whether GPUs here are NVIDIA's Hopper; also where there are none, and code is lowered for others to run."""
    kind = device_kind("cuda")
    return kind == "cuda" or re.search(r"\bG?H(100|200|800|20)\b", kind) is not None


def processors(usual: int) -> int:
    """Multiprocessors of the GPU here, of an MIG slice those that it has; the usual number where there is no GPU."""
    return jax.devices()[0].core_count if platform() == "cuda" else usual


def mosaic_lanes() -> Any:
    """Registers of one thread, as the body of `inline_mgpu` builds them."""
    return importlib.import_module("kernels_pallas.lanes")


def gpu_interpreter() -> Any:
    """What makes a GPU kernel run on a CPU, with its threads, barriers and copies; accesses that race are printed."""
    # JAX 0.10 has no public name for it.
    module = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    return module.InterpretGPUParams(detect_races=True)


def gpu_params() -> Any:
    """Compiler parameters of a GPU kernel that places its barriers and chooses its layouts itself, thread by thread.

    JAX 0.11 would infer layouts, which 0.10 does not.
    """
    gpu = mosaic_gpu()
    return gpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=gpu.LoweringSemantics.Lane
    )


def sums_layout() -> Any:
    """Of sums in registers, one value of 32 bits each instead of pairs, as a store to transposed memory needs them."""
    return mosaic_gpu().Layout._WGMMA_ACC_32BIT  # JAX has no public name for it.


def kernel_times(run: Callable[[], Any], calls: int) -> list[list[tuple[str, float]]]:
    """Name and microseconds of each kernel of each call on an NVIDIA GPU, by CUPTI; all calls launch equally many."""
    # `profiler.measure` calls with the same arguments again; here a call may take the next copy of a weight.
    profiler = importlib.import_module("jax.experimental.mosaic.gpu.profiler")
    library = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    library._cupti_init()
    try:
        jax.block_until_ready([run() for _ in range(calls)])
    finally:
        found = [(name, 1e3 * milliseconds) for name, milliseconds in library._cupti_get_timings(True)]
    each = len(found) // calls
    return [found[i * each : (i + 1) * each] for i in range(calls)]


def gpu_races_found() -> bool | None:
    """As `races_found`, of the GPU kernel that was interpreted last."""
    state = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    return None if state._races is None else state._races.races_found
