"""Which rounded activations of a plan LiteRT has, and what it makes of them.

*Hybrid* operators round their float32 input as it comes, to 8 bits with a zero point: fully connected layers a token
at a time (`int8_token_asym`), convolutions an image at a time (`int8_tensor_asym`). They multiply integers, by the
codes of the weight as they are. Ranges and rounding are the runtime's own, close to the plan's and not the same.

A *static* range (`int8_tensor_static`, also `_asym`) is that of an int8 tensor. A convolution by codes of 8 bits with a
scale for a channel is one of integers where what it gives has a range, too: where another convolution reads it, perhaps
after a rectifier. Elsewhere the input is rounded, and multiplied in float32 by the dequantized weight: the plan's own
arithmetic. What an integer convolution adds is of whole steps of its sums, and so is what the plan adds once those
steps are its own (`mpq.litert.export.with_whole_biases`). If asked (`Rounded.sums`), summands of residual blocks are
rounded as well, which the plan does not, codes of 4 bits are multiplied as they are, by sums that LiteRT rounds twice,
and most convolutions are of integers (`Codes.beside`). Integer operators want positive scales: absmax ones are; a
channel with another has its codes turned where that is possible, and is one of the dequantized where not.
"""

import dataclasses
from typing import Self

import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.activations.rows import ActivationSpec
from mpq.activations.scheme import ActivationScheme
from mpq.export.graphs import ROTATED
from mpq.export.orbax import Exported
from mpq.litert.graph import Quantization
from mpq.litert.weights import has_hybrid
from mpq.types import MpqError, Scheme, WeightSpec

TOKEN, TENSOR = "int8_token_asym", "int8_tensor_asym"
HYBRID = {"matmul": (TOKEN, TENSOR), "conv": (TENSOR,)}
"""Kind of a weight -> the schemes of its input that a hybrid operator has; `TENSOR` where that is one position."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """How a value is rounded to int8: `value ~= (code - zero) * scale`.

    Attributes:
      scale: a float32 number.
      zero: `-128 .. 127`.
    """

    scale: float
    zero: int

    @classmethod
    def of(cls, row: RoundedActivation) -> Self:
        """Those of a static row, as `mpq.activations.scheme` has them, its codes less 128 where they are not signed."""
        scale, zero = row.step
        return cls(scale, zero - 128 if row.scheme.asymmetric else 0)

    @classmethod
    def beside(cls, other: "Codes", total: "Codes", rectified: bool) -> Self:
        """Those of a summand, of which no more is clipped than the sum clips: `[low - high', high - low']`.

        Args:
          other: the other summand.
          total: the sum.
          rectified: whether it is `max(0, sum)`, whose lower end is then 0.
        """
        (low, high), (least, most) = total.ends, other.ends
        low, high = min((0.0 if rectified else low) - most, 0.0), max(high - least, 0.0)
        scale = np.float32((high - low) / 255)
        return cls(float(scale), int(np.clip(np.round(-low / scale) - 128, -128, 127)))

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return (-128 - self.zero) * self.scale, (127 - self.zero) * self.scale

    @property
    def quantization(self) -> Quantization:
        """As a tensor has it."""
        return Quantization(np.array([self.scale], np.float32), np.array([self.zero]))


@dataclasses.dataclass(frozen=True)
class Rounded:
    """What the plan rounds.

    Attributes:
      hybrid: path of a weight whose input is rounded as it comes -> the scheme.
      static: path of a weight -> how its input is rounded.
      sums: whether sums of a convolution and a rounded value are rounded, too, and products by codes of 4 bits twice.
    """

    hybrid: dict[str, str] = dataclasses.field(default_factory=dict)
    static: dict[str, Codes] = dataclasses.field(default_factory=dict)
    sums: bool = False

    @classmethod
    def of(cls, exported: Exported, sums: bool = False) -> Self:
        """Those of a plan.

        Raises:
          MpqError: an activation is rounded as LiteRT does not, or its weight has no such operator.
        """
        specs, hybrid, static = {spec.path: spec for spec in exported.weights}, {}, {}
        for path, body in exported.plan.get("activations", {}).items():
            row = RoundedActivation.from_json(body, *exported.of_row(path))
            for weight in row.spec.weights:
                if reason := _why_not(row, specs[weight], exported.qtensors[weight].scheme):
                    raise MpqError(
                        f"activation {path} at {row.scheme} has no form in litert: {reason}; quantize with the plan of "
                        "the weights alone, or another"
                    )
                if row.scheme.static is None:
                    hybrid[weight] = str(row.scheme)
                else:
                    static[weight] = Codes.of(row)
        return cls(hybrid, static, sums)


def _why_not(row: RoundedActivation, spec: WeightSpec, scheme: Scheme) -> str | None:
    if row.turn is not None:
        return ROTATED
    if row.smooth is not None:
        return "it divides inputs by no factors"
    return rounding_refusal(row.spec, row.scheme) or pair_refusal(row.scheme, spec, scheme)


def rounding_refusal(row: ActivationSpec, scheme: ActivationScheme) -> str | None:
    """Why a row cannot be rounded so, whatever reads it; None where it can."""
    if row.kind != "activation":
        return "it keeps no KV cache"
    if scheme.threshold:
        return "it keeps no features in floating point; int8_token_asym rounds them all"
    if scheme.minifloat:
        return "it has no FP8; use int8_token_asym"
    if scheme.static is None and str(scheme) not in (TOKEN, TENSOR):
        return f"as they come inputs are rounded by {TOKEN} there, those of convolutions by {TENSOR}"
    whole = scheme.static is None or (scheme.bits == 8 and scheme.granularity == "tensor")
    return None if whole else "static ranges are of whole tensors in 8 bits"


def pair_refusal(activation: ActivationScheme, spec: WeightSpec, scheme: Scheme) -> str | None:
    """Why the input of a weight at `scheme` cannot be rounded so; None where it can."""
    if activation.static is not None:
        return None
    (use, *others) = sorted({use.kind for use in spec.uses if use.kind != "embedding"})
    if others or str(activation) not in HYBRID[use]:
        return f"as they come inputs are rounded by {HYBRID[use][0]} there"
    if spec.batch > 1 or spec.factors or not has_hybrid(scheme) or (use == "conv" and scheme.format.bits == 2):
        return f"it multiplies no codes of {spec.path} at {scheme}"
    return None
