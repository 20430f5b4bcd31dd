"""What devices can do at most, for predictions: bytes and operations a second.

The figures are those of the manufacturers' data sheets, for a CPU round numbers of two cores; a benchmark measures its
own. Predictions choose between backends and tiles, so only ratios matter, and a tuned table overrides them.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Device:
    """Upper limits of one device.

    Attributes:
      bandwidth: bytes a second between memory and chip.
      macs: dtype name of the operands -> multiply-accumulates a second.
      unpack: codes a second that become operands outside a kernel, by vector instructions.
      fast_memory: bytes of scratch memory that a kernel may fill.
    """

    bandwidth: float
    macs: Mapping[str, float]
    unpack: float
    fast_memory: int

    def seconds(self, num_bytes: float, macs: float, dtype: str) -> float:
        """The roofline: whatever takes longer, moving or multiplying (Williams et al. 2009, doi 10.1145/1498765)."""
        return max(num_bytes / self.bandwidth, macs / self.macs.get(dtype, self.macs["float32"]))


def _device(bandwidth: float, f32: float, bf16: float, int8: float, unpack: float, fast_memory: int) -> Device:
    macs = {"float32": f32, "bfloat16": bf16, "float16": bf16, "int8": int8}
    return Device(bandwidth, MappingProxyType(macs), unpack, fast_memory)


MEGABYTE = 2**20

DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "cpu": _device(2e10, 5e10, 5e10, 1e11, 5e8, MEGABYTE),
        "TPU v5 lite": _device(8.2e11, 3.3e13, 9.85e13, 1.97e14, 2e11, 16 * MEGABYTE),
        "TPU v5": _device(2.77e12, 7.6e13, 2.3e14, 4.6e14, 4e11, 16 * MEGABYTE),
        "TPU v6 lite": _device(1.64e12, 1.5e14, 4.6e14, 9.2e14, 4e11, 16 * MEGABYTE),
        "NVIDIA H100 80GB HBM3": _device(3.35e12, 2.5e14, 4.95e14, 9.9e14, 2e12, 227 * 1024),
        "NVIDIA H200": _device(4.8e12, 2.5e14, 4.95e14, 9.9e14, 2e12, 227 * 1024),
    }
)

_DEFAULT = {"cpu": "cpu", "tpu": "TPU v5 lite", "cuda": "NVIDIA H100 80GB HBM3", "gpu": "NVIDIA H100 80GB HBM3"}


def device(kind: str, platform: str) -> Device:
    """The device of this kind as JAX calls it, or a usual one of the platform."""
    return DEVICES.get(kind, DEVICES[_DEFAULT.get(platform, "cpu")])
