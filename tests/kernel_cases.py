"""What a matmul with a packed weight must be: an oracle in float64 NumPy, a bound on float32, and both as one check."""

import numpy as np

from kernels_pallas.cases import Case, draw

EPS = np.finfo(np.float32).eps  # twice the unit roundoff, which pays for second-order terms


def spread(per_group, case):
    """`[*batch, groups, n]` to `[*batch, k, n]`."""
    rows = np.arange(case.k) // (case.group_size or case.k)
    return np.take(per_group, rows, axis=-2).astype(np.float64)


def oracle(case: Case, x, arrays):
    """`y[*batch, m, n]` and, for the bound, the sum of the absolute values of all that is added up, in float64."""
    x = np.asarray(x, np.float64)
    codes, scales = arrays["codes"].astype(np.float64), spread(arrays["scales"], case)
    zeros = spread(arrays["zeros"], case) if case.zeros else np.zeros_like(codes)
    value = np.asarray(case.levels)[arrays["codes"]] if case.nf4 else codes
    return x @ ((value - zeros) * scales), np.abs(x) @ ((np.abs(value) + np.abs(zeros)) * np.abs(scales))


def bound(case: Case, magnitude, rounded=False):
    """The largest error of float32 sums in any order: |error| <= u * (operations on a path) * sum of magnitudes.

    Higham 2002, Accuracy and Stability of Numerical Algorithms, eq. 3.5. A product passes at most k - 1 additions (with
    rounded activations none: inner products are int32), one a group and tile of 128 rows, those of the zero points'
    product, and its own rounding, that of the scale and of the conversion to float32, of the token's scale and of the
    table's value, each once. Where weights are `rounded` to bfloat16, each product is off by half its last bit more.
    """
    groups = case.spec.groups
    additions = (0 if case.activation_bits == 8 else case.k) + 2 * groups + -(-case.k // 128) + 6
    return (additions * EPS + (2.0**-8 if rounded and case.activation_bits is None else 0)) * magnitude


def check(run, case: Case, layout: str, exact: bool, rounded: bool = False):
    """`run(x, packed) -> y` equals the oracle: bit for bit on integers and powers of two, else within the bound."""
    exact = exact and not case.nf4
    x, packed, arrays = draw(case, layout, int(exact), exact)
    want, magnitude = oracle(case, x, arrays)
    got = np.asarray(run(x, packed), np.float64)
    assert got.shape == want.shape
    if exact:
        # In units of the smallest scale, and of the smallest token's, every sum is an integer below 2^24: exact.
        assert magnitude.max() / arrays["scales"].min() / (0.25 if case.activation_bits else 1) < 2**24
        np.testing.assert_array_equal(got, want)
    else:
        wrong = np.abs(got - want) > bound(case, magnitude, rounded)
        assert not wrong.any(), f"{wrong.sum()} of {wrong.size} outputs are off by more than float32 allows"
