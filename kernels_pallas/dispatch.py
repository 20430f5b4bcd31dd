"""Which backend computes a problem, and with which tiles.

In this order: the entry of the device's tuned table for exactly this problem; that of the nearest problem of the same
format, group size and layout; else the smallest prediction from bytes and operations. Never a fixed tile, with which
libraries are slowest where nobody tuned. `reference` reads every layout on every platform, so there is always one; it
dequantizes and then multiplies, and is taken wherever a packed kernel is measured or predicted to be slower than that.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from kernels_pallas import compat
from kernels_pallas import reference as contract
from kernels_pallas.backend import Backend, Config, Problem, dot_type
from kernels_pallas.cpu import CPU
from kernels_pallas.dense import DENSE
from kernels_pallas.devices import Device, device
from kernels_pallas.errors import KernelError
from kernels_pallas.hopper import HOPPER
from kernels_pallas.native import NATIVE
from kernels_pallas.rows import PLAIN
from kernels_pallas.tables import Entry, entries, nearest
from kernels_pallas.tpu import TPU


def _reference_seconds(problem: Problem, device: Device) -> float:
    """Codes unpacked, and a float32 weight written and read again before the dot."""
    elements = problem.batch * problem.k * problem.n
    moved = problem.num_bytes + 2 * 4 * elements
    return device.seconds(moved, problem.macs, "float32") + elements / device.unpack


REFERENCE = Backend(
    platforms=(),
    layouts=(),
    interpretable=True,
    run=lambda x, packed, activation_bits, config, interpret: contract.matmul(x, packed, activation_bits),
    seconds=_reference_seconds,
    complete=True,
)

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {"reference": REFERENCE, "cpu": CPU, "rows": PLAIN, "native": NATIVE, "tpu": TPU, "hopper": HOPPER, "dense": DENSE}
)


def refusal(backend: Backend, problem: Problem, platform: str, interpret: bool) -> str | None:
    """Why a backend cannot compute a problem here, or None."""
    if backend.layouts and problem.layout not in backend.layouts:
        return f"it reads layout {', '.join(backend.layouts)}, not {problem.layout!r}: use `relayout`"
    if interpret and not backend.interpretable:
        return "it has no kernel to interpret: leave `interpret` out"
    if backend.platforms and platform not in backend.platforms and not interpret:
        return f"it runs on {', '.join(backend.platforms)}, not on {platform}: use backend='auto'"
    if problem.table and problem.activation_bits is not None:
        return "values of a table have no integer product"
    return backend.refuses(problem)


def own_layout(platform: str) -> str:
    """The layout that the kernels of a platform read, as JAX or this package calls it; `plain` where it has none."""
    hopper = "hopper" if compat.hopper() else "plain"
    return {"cpu": "cpu", "tpu": "tpu", "cuda": hopper, "gpu": hopper}.get(platform, "plain")


def choose(
    problem: Problem, platform: str, tuned: Sequence[Entry] | None = None, interpret: bool = False
) -> tuple[str, Config]:
    """Name of the backend and its config, as the module says.

    Args:
      problem: what is to be computed.
      platform: `cpu`, `tpu` or `cuda`.
      tuned: entries of a table; None for that of the device.
      interpret: only backends that can be interpreted.

    Raises:
      KernelError: not even the reference can.
    """
    kind = compat.device_kind(platform)
    able = [name for name, backend in BACKENDS.items() if refusal(backend, problem, platform, interpret) is None]
    if not able:
        raise KernelError(f"no backend computes {problem.format}: {refusal(REFERENCE, problem, platform, interpret)}")
    near = nearest(problem, [e for e in (entries(kind) if tuned is None else tuned) if e.backend in able])
    name = near.backend if near else min(able, key=lambda n: BACKENDS[n].seconds(problem, device(kind, platform)))
    # Tiles hang on the number of tokens more than the choice of a backend does.
    if near and near.problem.m / 2 <= problem.m <= 2 * near.problem.m and BACKENDS[name].legal(problem, near.config):
        return name, near.config
    return name, BACKENDS[name].tiles(problem)


def roofline(problem: Problem, platform: str) -> float:
    """Seconds that the problem takes at least on the device, or on a usual one of its platform."""
    limits = device(compat.device_kind(platform), platform)
    return limits.seconds(problem.num_bytes, problem.macs, dot_type(problem))
