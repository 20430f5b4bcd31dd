"""Training on several devices: batches divided among them, and with FSDP what is trained, too.

Arrays are placed, and the compiler follows (`jax.sharding`; GSPMD, Xu et al. 2021, arXiv:2105.04663): the program of a
step is the same as on one device, its loss the mean over the whole batch. With *data parallelism* every device holds
all parameters and an equal part of the batch. *Fully sharded* (FSDP, Zhao et al. 2023, arXiv:2304.11277; ZeRO's third
stage) divides parameters, latent numbers and the optimizer's moments too, each along its longest axis that can be
divided, and gathers a weight where it is read.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpq.types import MpqError

_AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Devices:
    """Which devices train.

    Attributes:
      count: the first so many of `jax.devices()`.
      fsdp: divide what is trained among them.
    """

    count: int = 1
    fsdp: bool = False

    def check(self, batch_size: int) -> None:
        """Refuse what cannot be divided.

        Raises:
          MpqError: there are fewer devices, or the batch cannot be divided among them.
        """
        there = len(jax.devices())
        if not 1 <= self.count <= there:
            raise MpqError(f"{self.count} devices are wanted and {there} are here: give 1 to {there}")
        if batch_size % self.count:
            raise MpqError(
                f"a batch of {batch_size} cannot be divided among {self.count} devices: give a multiple of them"
            )

    def batch(self, array: Any) -> Any:
        """A batch, its first axis divided."""
        return array if self.count == 1 else jax.device_put(array, NamedSharding(self._mesh, PartitionSpec(_AXIS)))

    def place(self, tree: Any) -> Any:
        """Arrays that are trained, or stay, where they belong."""
        return tree if self.count == 1 else jax.tree.map(lambda leaf: jax.device_put(leaf, self._of(leaf)), tree)

    def _of(self, leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        fitting = [axis for axis, size in enumerate(shape) if size and size % self.count == 0]
        if not self.fsdp or not fitting:
            return NamedSharding(self._mesh, PartitionSpec())
        longest = max(fitting, key=lambda axis: shape[axis])
        return NamedSharding(self._mesh, PartitionSpec(*(_AXIS if a == longest else None for a in range(len(shape)))))

    @property
    def _mesh(self) -> Mesh:
        return Mesh(np.asarray(jax.devices()[: self.count]), (_AXIS,))


ONE = Devices()
"""One device, the first."""
