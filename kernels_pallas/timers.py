"""Microseconds of calls: by the clock of the host, or as an NVIDIA GPU's own counters see its kernels."""

import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

from kernels_pallas import compat

Name = TypeVar("Name", bound=Hashable)


def times(runs: Mapping[Name, Callable[[], Any]], repeats: int) -> dict[Name, np.ndarray]:
    """Microseconds of every call of functions that return arrays, compiled before.

    On a CPU and a TPU from the call until the result is there; functions take turns, so that other work on the machine
    hits all alike. On a GPU the kernels of a call alone, without the gaps between them, which a launch from the host
    leaves and a graph of launches does not.
    """
    first, *others = runs.values()
    jax.block_until_ready(first())
    # Compilers of GPU kernels run side by side; on a CPU they would take turns anyway.
    with ThreadPoolExecutor(8 if compat.platform() == "cuda" else 1) as pool:
        list(pool.map(lambda run: jax.block_until_ready(run()), others))
    if compat.platform() == "cuda":
        whole = lambda run: np.array([sum(micro for _, micro in call) for call in compat.kernel_times(run, repeats)])
        return {name: whole(run) for name, run in runs.items()}
    taken: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            taken[name].append(1e6 * (time.perf_counter() - start))
    return {name: np.array(values) for name, values in taken.items()}
