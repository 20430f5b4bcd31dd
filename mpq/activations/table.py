"""Predicted loss increase when one activation, or one projection's part of the KV cache, is rounded; and its file.

The fields are those of `SensitivityTable`. It is a type of its own because its rows are no weights: they have no
parameter and no stored size, but values a token, and their schemes have no group size.
"""

import dataclasses
from pathlib import Path
from typing import Self

import numpy as np

from mpq.activations.rows import ActivationSpec
from mpq.activations.scheme import ActivationScheme, parse_activation_scheme
from mpq.artifacts import read_stage, table_body, table_fields, write_stage


@dataclasses.dataclass(frozen=True, eq=False)
class ActivationTable:
    """Sensitivities of activations.

    Attributes:
      activations, schemes: rows and columns.
      loss_increase: `float64[rows, schemes]`, nats per output.
      stderr: `float64[rows, schemes]`, standard error over documents; 0 where nothing changed, NaN where a single
        document leaves it unknown.
      metric: name of the metric and its options.
      quantizer: how ranges are found: `dynamic`, `static`, or both.
      model_digest, data_digest: what it was made from.
    """

    activations: tuple[ActivationSpec, ...]
    schemes: tuple[ActivationScheme, ...]
    loss_increase: np.ndarray
    stderr: np.ndarray
    metric: str
    quantizer: str
    model_digest: str
    data_digest: str

    def at(self, column: int) -> Self:
        """The same of one scheme alone."""
        part = slice(column, column + 1)
        parts = {"loss_increase": self.loss_increase[:, part], "stderr": self.stderr[:, part]}
        return dataclasses.replace(self, schemes=self.schemes[part], **parts)


def save_activation_table(path: Path, table: ActivationTable) -> None:
    """Write a table, canonical JSON: equal tables give equal bytes.

    Raises:
      MpqError: the disk is full, or the operating system refuses.
    """
    rows = [dataclasses.asdict(row) for row in table.activations]
    write_stage(path, "activations", {**table_body(table), "activations": rows})


def load_activation_table(path: Path) -> ActivationTable:
    """Read a table.

    Raises:
      MpqError: missing, damaged, or not a table of activations.
    """
    body = read_stage(path, "activations")
    return ActivationTable(
        activations=tuple(map(ActivationSpec.from_json, body["activations"])),
        schemes=tuple(map(parse_activation_scheme, body["schemes"])),
        **table_fields(body),
    )
