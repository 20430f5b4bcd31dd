"""How a static range is chosen from what calibration saw: five methods, all from one histogram or the windows' ranges.

    absmax          the least and the largest value seen: nothing is clipped
    moving_average  of the windows' ranges, in the order of the data, each new one with weight 0.1
    percentile      clips 0.01 % of the values (asymmetric: 0.005 % at either end)
    mse             least mean squared error of rounding to the scheme's levels, over 128 equal shares of the range
    entropy         least KL of the rounded histogram to the clipped one

The moving average is that of Jacob et al. 2018 (arXiv:1712.05877, section 3.1); percentiles and the comparison of the
methods are in Wu et al. 2020 (arXiv:2004.09602, section 3.4). Entropy is TensorRT's (Migacz, "8-bit inference with
TensorRT", GTC 2017): of every number of bins i that may be kept, P are the first i with all that lies beyond them
added to the last, Q the same bins without that, merged to as many as there are levels and spread again over those that
are not empty; the first bin, where zeros lie, is taken to be as full as the second. Differences: bins are between
1/4096 and 1/2048 of the range, and every 16th i is tried; TensorRT takes 2048 bins and tries all.

Values in a bin are taken to lie at its middle, so errors are known up to half a bin: for 8 bits 1/16 of a step or less.
Cost: milliseconds a row, on the host.
Fails on: entropy below 8 bits, where it clips what matters; percentile where the few largest values matter.
"""

import jax.numpy as jnp
import numpy as np

from mpq.activations.ranges import BINS, ActivationRange
from mpq.activations.scheme import ActivationScheme, nearest_fp8
from mpq.types import MpqError

MOMENTUM = 0.9
CLIPPED = 1e-4
SHARES = 128
_ENTROPY_STRIDE = 16


def choose_range(found: ActivationRange | None, scheme: ActivationScheme, path: str) -> tuple[np.ndarray, np.ndarray]:
    """The static range of one row under a scheme.

    Args:
      found: what calibration saw of it, None if nothing.
      scheme: a static one.
      path: of the row.

    Returns:
      Least and largest value that is not clipped, `float32[parts]` each: a part a head, or one for the tensor. 0 lies
      between them; a symmetric range has equal ends.

    Raises:
      MpqError: the row was never calibrated, never computed on the calibration data, or had a single value there.
    """
    if found is None:
        raise MpqError(
            f"{path} at {scheme} has no calibrated range: run mpq calibrate --of activations (or kv), or give a "
            "dynamic scheme such as int8_token"
        )
    if not found.values:
        raise MpqError(
            f"{path} at {scheme}: the row was never computed on the calibration data; calibrate on data that reaches "
            "it, or take a dynamic scheme"
        )
    whole = scheme.granularity == "tensor"
    counts = found.counts.sum(axis=0, keepdims=True) if whole else found.counts
    low, high = found.low, found.high
    if whole:
        low, high = low.min(axis=1, keepdims=True), high.max(axis=1, keepdims=True)
    for single in low.min(axis=0)[low.min(axis=0) == high.max(axis=0)]:
        raise MpqError(
            f"{path} at {scheme} had the single value {single:g} in all {found.values:,} places of the calibration "
            "data: no range can be told from that; calibrate on other data, or take a dynamic scheme"
        )
    ends = [_of_part(scheme, c, found.exponent, a, b) for c, a, b in zip(counts, low.T, high.T, strict=True)]
    return tuple(np.array(end, np.float32) for end in zip(*ends, strict=True))  # type: ignore[return-value]


def choose_columns(found: ActivationRange | None, scheme: ActivationScheme, path: str) -> tuple[int, ...]:
    """The features of one row that reached the scheme's threshold on calibration data.

    Args:
      found: what calibration saw of it, None if nothing.
      scheme: one with outliers known from calibration.
      path: of the row.

    Raises:
      MpqError: the row was never calibrated.
    """
    if found is None:
        raise MpqError(
            f"{path} at {scheme} has no calibrated outliers: run mpq calibrate --of activations, or find them as they "
            f"come, {str(scheme).removesuffix('_static')}"
        )
    return tuple(np.flatnonzero(found.largest >= scheme.threshold).tolist())


def _of_part(
    scheme: ActivationScheme, counts: np.ndarray, exponent: int, low: np.ndarray, high: np.ndarray
) -> tuple[float, float]:
    """Ends of one part, from its histogram `int64[BINS]` and its windows' ends `float32[windows]`."""
    seen = np.isfinite(low)
    low, high = np.minimum(low[seen], 0.0).astype(np.float64), np.maximum(high[seen], 0.0).astype(np.float64)
    if scheme.static == "moving_average":
        least, largest = _moving_average(low), _moving_average(high)
    else:
        least, largest = low.min(), high.max()
    if not scheme.asymmetric:
        largest = max(largest, -least)
        least = -largest
    width = 2.0 ** (exponent + 1) / BINS
    if scheme.static == "percentile":
        return _percentile(counts, width, least, largest, scheme.asymmetric)
    if scheme.static == "mse":
        share = _least_squares(counts, width, least, largest, scheme)
        return share * least, share * largest
    if scheme.static == "entropy":
        largest = min(largest, _least_entropy(counts, scheme.top + 1) * width)
        return -largest, largest
    return float(least), float(largest)


def _moving_average(ends: np.ndarray) -> float:
    """Of `[windows]`, the first one at full weight to begin with."""
    mean = float(ends[0])
    for end in ends[1:]:
        mean = MOMENTUM * mean + (1 - MOMENTUM) * float(end)
    return mean


def _percentile(
    counts: np.ndarray, width: float, least: float, largest: float, asymmetric: bool
) -> tuple[float, float]:
    """The edges beyond which the allowed share of the values lies at most."""
    if not asymmetric:
        end = min(largest, _edge(_folded(counts), CLIPPED) * width)
        return -end, end
    half = BINS // 2
    low, high = half - _edge(counts[::-1], CLIPPED / 2), _edge(counts, CLIPPED / 2) - half
    return max(least, min(low * width, 0.0)), min(largest, max(high * width, 0.0))


def _edge(counts: np.ndarray, share: float) -> int:
    """The number of bins, from the first on, that leave out at most `share` of all values."""
    kept = np.cumsum(counts)
    return int(np.searchsorted(kept, kept[-1] - share * kept[-1])) + 1


def _folded(counts: np.ndarray) -> np.ndarray:
    """`[BINS / 2]`: magnitudes, the bins of both signs added."""
    return counts[BINS // 2 :] + counts[: BINS // 2][::-1]


def _least_squares(counts: np.ndarray, width: float, least: float, largest: float, scheme: ActivationScheme) -> float:
    """The share of the range whose rounding has the least mean squared error."""
    used = np.flatnonzero(counts)
    x, weight = (used - BINS // 2 + 0.5) * width, counts[used].astype(np.float64)
    shares = np.arange(1, SHARES + 1) / SHARES
    low, high = shares[:, None] * least, shares[:, None] * largest
    if scheme.asymmetric:
        step = (high - low) / scheme.top
        zero = np.round(-low / step)
        rounded = (np.clip(np.round(x / step) + zero, 0, scheme.top) - zero) * step
    elif scheme.minifloat:
        step = high / scheme.top
        rounded = np.asarray(nearest_fp8(jnp.asarray(np.clip(x / step, -scheme.top, scheme.top)))) * step
    else:
        step = high / scheme.top
        rounded = np.clip(np.round(x / step), -scheme.top, scheme.top) * step
    return float(shares[np.argmin((np.square(rounded - x) * weight).sum(axis=1))])


def _least_entropy(counts: np.ndarray, levels: int) -> int:
    """Bins of the magnitudes to keep."""
    bins = _folded(counts).astype(np.float64)
    bins[0] = bins[1]
    used = int(np.flatnonzero(bins)[-1]) + 1 if bins.any() else len(bins)
    tried = [*range(levels, used, _ENTROPY_STRIDE), used]
    return min(tried, key=lambda kept: _divergence(bins, kept, levels))


def _divergence(bins: np.ndarray, kept: int, levels: int) -> float:
    """KL(P || Q) in nats, infinite where Q is 0 and P is not."""
    first = bins[:kept]
    p = first.copy()
    p[-1] += bins[kept:].sum()
    level = np.arange(kept) * levels // kept
    filled = first > 0
    mass, members = np.bincount(level, first, levels), np.bincount(level, filled, levels)
    q = np.where(filled, (mass / np.maximum(members, 1))[level], 0.0)
    if (p[~filled] > 0).any() or not filled.any():
        return np.inf
    p, q = p[filled] / p.sum(), q[filled] / q.sum()
    return float(np.sum(p * np.log(p / q)))
