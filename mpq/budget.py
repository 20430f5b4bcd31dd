"""A budget as a person writes it, in bits of the quantized weights."""

from collections.abc import Mapping

from mpq.artifacts import Plan, other_bits
from mpq.models import Model
from mpq.trace import Trace
from mpq.types import MpqError
from mpq.units import parse_size


def budget_bits(budget: str, model: Model, traced: Trace, uniform: Mapping[str, Plan]) -> int:
    """Bits that the quantized weights may take.

    Args:
      budget: `3.5bpw`; a size of the whole model such as `4MB`; or the name of a uniform scheme: exactly its size.
      model: what is quantized.
      traced: its trace.
      uniform: uniform plans by scheme.

    Raises:
      MpqError: none of the three, or more than the original takes.
    """
    if budget in uniform:
        return uniform[budget].size_bits
    values = sum(w.size for w in traced.weights)
    beside = other_bits(model, traced.weights)
    if budget.endswith("bpw"):
        try:
            bits = int(float(budget.removesuffix("bpw")) * values)
        except ValueError as error:
            raise MpqError(f"budget {budget!r} is wrong: write 3.5bpw, 4MB, or a scheme such as int4_g64") from error
    else:
        bits = parse_size(budget) - beside
    original = 8 * model.size_bytes
    if bits + beside > original:
        given = (bits + beside) / 8e6
        raise MpqError(
            f"budget {budget!r} ({given:.3f} MB) is above the original's {original / 8e6:.3f} MB: ask for less"
        )
    return bits
