"""SignRound against its descent, written again in float64 with derivatives by hand; and the best of several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import parse_scheme
from mpq.quantize import signround
from mpq.quantize.best import Best
from mpq.quantize.gptq import GPTQ
from mpq.quantize.hqq import HQQ
from mpq.quantize.rtn import RTN
from mpq.quantize.signround import SignRound
from mpq.types import MpqError, QTensor, Scheme

K, N, SIZE = 24, 32, 8


def problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the gram of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, K)) @ (0.3 * rng.standard_normal((K, K)) + np.eye(K))
    w = rng.standard_normal((1, K, N)).astype(np.float32)
    return w, (x.T @ x / 200)[None].astype(np.float32)


def layer_loss(w: np.ndarray, qtensor: QTensor, gram: np.ndarray) -> np.ndarray:
    """`float64[n]`."""
    error = np.asarray(w, np.float64)[0] - np.asarray(qtensor.dequantize(), np.float64)[0]
    return np.einsum("kn,kl,ln->n", error, np.asarray(gram, np.float64)[0], error)


class Descent:
    """One output column in float64, from a given start.

    Attributes:
      margin: the closest that any value came to a tie between two levels or codes, in steps, to where codes end, or
        any slope to zero, relatively to the largest.
    """

    def __init__(self, w: np.ndarray, gram: np.ndarray, start: QTensor, column: int) -> None:
        grid, self.affine = start.scheme.format, start.scheme.zero_point
        codes = jnp.arange(grid.min_qvalue, grid.max_qvalue + 1, dtype=jnp.int8)
        self.levels = np.asarray(grid.decode(codes), np.float64)
        self.w, self.gram = w[0, :, column].astype(np.float64), gram[0].astype(np.float64)
        self.scale = np.asarray(start.scale, np.float64)[0, :, column]
        self.zero = np.zeros(K // SIZE) if not self.affine else np.asarray(start.zero_point, np.float64)[0, :, column]
        at = np.asarray(start.qvalue)[0, :, column] - grid.min_qvalue
        below, above = np.maximum(at - 1, 0), np.minimum(at + 1, len(self.levels) - 1)
        self.gap = (self.levels[above] - self.levels[below]) / (above - below)
        beyond = np.array([self.levels[0] - self.levels[1], self.levels[-1] - self.levels[-2]]) / 2
        self.reach = self.levels[[0, -1]] + beyond
        self.margin, spread = np.inf, lambda a: np.repeat(a, SIZE)
        value = self.w / spread(self.scale) + spread(self.zero)
        self.fixed = np.where(self.nearest(value) == self.levels[at], 0, self.levels[at] - value)

    def nearest(self, value: np.ndarray) -> np.ndarray:
        distance = np.abs(value[:, None] - self.levels)
        two = np.sort(distance, axis=1)[:, :2]
        self.margin = min(self.margin, (two[:, 1] - two[:, 0]).min(), np.abs(value[:, None] - self.reach).min())
        return self.levels[distance.argmin(axis=1)]

    def run(self, steps: int) -> tuple[np.ndarray, float]:
        """What the column becomes, and its loss."""
        offset, low, high = np.zeros(K), np.ones(K // SIZE), np.ones(K // SIZE)
        first, last, spread = self.levels[0], self.levels[-1], lambda a: np.repeat(a, SIZE)
        best, least = self.w, np.inf
        for t in range(steps):
            scale, zero = self.scale * high, self.zero
            if self.affine:
                bottom, top = (first - self.zero) * low, (last - self.zero) * high
                scale = self.scale * (top - bottom) / (last - first)
                exact = np.clip(first - bottom * (last - first) / (top - bottom), first, last)
                zero = np.round(exact)
                self.margin = min(self.margin, (0.5 - np.abs(exact - zero)).min())
            value = self.w / spread(scale) + spread(zero) + self.fixed + offset * self.gap
            level = self.nearest(value)
            inside = (value > self.reach[0]) & (value < self.reach[1])
            error = self.w - (level - spread(zero)) * spread(scale)
            pull = self.gram @ error
            if error @ pull < least:
                best, least = self.w - error, error @ pull
            by_group = lambda a: a.reshape(-1, SIZE).sum(axis=1)
            by_scale = by_group(pull * (level - spread(zero) - inside * self.w / spread(scale)))
            by_zero = by_group(pull * (inside - 1.0) * spread(scale))
            slopes = [pull * inside * self.gap * spread(scale)]
            if self.affine:
                width, free = top - bottom, (exact > first) & (exact < last)
                to_top = by_scale * self.scale / (last - first) + by_zero * free * (last - first) * bottom / width**2
                to_low = -by_scale * self.scale / (last - first) - by_zero * free * (last - first) * top / width**2
                slopes += [to_low * (first - self.zero), to_top * (last - self.zero)]
            else:
                slopes += [np.zeros(K // SIZE), by_scale * self.scale]
            for slope in slopes:
                moving = np.abs(slope[slope != 0])
                self.margin = min([self.margin, *(moving / np.abs(pull).max())])
            rate = (1 - t / steps) / steps
            offset = np.clip(offset + rate * np.sign(slopes[0]), -0.5, 0.5)
            low, high = (np.clip(a + rate * np.sign(s), 0.5, 1.5) for a, s in zip((low, high), slopes[1:], strict=True))
        return best, least


@pytest.mark.parametrize(("text", "start"), [("int3_g8", GPTQ()), ("int2_g8_zp", RTN("mse")), ("nf4_g8", RTN("mse"))])
def test_it_is_the_best_step_of_the_descent(text: str, start: RTN | GPTQ) -> None:
    """Columns with a near tie are left out: there, rounding of the arithmetic decides."""
    scheme, (w, gram) = parse_scheme(f"{text}_sfloat32"), problem(0)
    begin = start(jnp.asarray(w), scheme, jnp.asarray(gram))
    got = np.asarray(SignRound(12, start=start)(jnp.asarray(w), scheme, jnp.asarray(gram)).dequantize(), np.float64)[0]
    compared, moved = 0, 0
    for column in range(N):
        descent = Descent(w, gram, begin, column)
        expected, loss = descent.run(12)
        # Values of a few steps are off by a few eps of that, sums of 24 products by 24 eps: 2e-5 is above both.
        if descent.margin > 2e-5:
            compared += 1
            moved += loss < 0.999 * layer_loss(w, begin, gram)[column]
            np.testing.assert_allclose(got[:, column], expected, rtol=1e-5, atol=1e-6)
    assert compared > 0.5 * N
    assert moved > 0.15 * compared


def test_it_is_better_than_its_start() -> None:
    scheme, (w, gram) = parse_scheme("int2_g8_zp_sfloat32"), problem(1)
    loss = lambda quantizer: layer_loss(w, quantizer(jnp.asarray(w), scheme, jnp.asarray(gram)), gram)
    nearest, learned = loss(RTN("mse")), loss(SignRound(12, start=RTN("mse")))
    # The float32 choice between two sums of k * k terms, each within 2 k eps of its size.
    slack = 1 + 4 * K * np.finfo(np.float32).eps
    assert (learned <= nearest * slack).all()
    assert learned.sum() < 0.95 * nearest.sum()
    assert (loss(SignRound(12)) <= loss(GPTQ()) * slack).all()


def test_without_ranges_only_codes_are_learned() -> None:
    scheme, (w, gram) = parse_scheme("int2_g8_zp_sfloat32"), problem(1)
    arguments = jnp.asarray(w), scheme, jnp.asarray(gram)
    got, start = SignRound(12, ranges=False, start=RTN("mse"))(*arguments), RTN("mse")(*arguments)
    assert layer_loss(w, got, gram).sum() < 0.95 * layer_loss(w, start, gram).sum()
    for a, b in ((got.scale, start.scale), (got.zero_point, start.zero_point)):
        assert a is not None
        assert b is not None
        np.testing.assert_array_equal(a, b)


def test_columns_computed_at_once_change_nothing_and_share_a_compilation() -> None:
    w, gram, scheme = *problem(2), parse_scheme("int3_g8")
    quantize = SignRound(8, start=RTN("mse"), columns=16)
    whole = quantize(jnp.asarray(w), scheme, jnp.asarray(gram))
    compiled = signround._learn._cache_size()
    for n in (9, 16):
        for text in ("int3_g8", "int4_g8"):
            part = quantize(jnp.asarray(w[..., :n]), parse_scheme(text), jnp.asarray(gram))
            if text == "int3_g8":
                np.testing.assert_array_equal(part.dequantize(), whole.dequantize()[..., :n])
    assert signround._learn._cache_size() == compiled


def test_without_a_gram_it_is_its_start() -> None:
    w, _ = problem(3)
    for start in (RTN(), RTN("mse")):
        got = SignRound(start=start)(jnp.asarray(w), parse_scheme("int3_g8"))
        np.testing.assert_array_equal(got.dequantize(), start(jnp.asarray(w), parse_scheme("int3_g8")).dequantize())


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"columns": 0}])
def test_no_steps_and_no_columns_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(MpqError, match="must be at least 1, such as 200 and 256"):
        SignRound(**wrong)


class TestBest:
    MEMBERS = (RTN("mse"), GPTQ(), HQQ())

    def results(self, scheme: Scheme, seed: int) -> tuple[np.ndarray, np.ndarray, QTensor, list[QTensor]]:
        w, gram = problem(seed)
        run = lambda quantizer: quantizer(jnp.asarray(w), scheme, jnp.asarray(gram))
        return w, gram, run(Best(self.MEMBERS)), [run(member) for member in self.MEMBERS]

    def test_every_column_is_that_of_the_member_with_the_smallest_loss(self) -> None:
        w, gram, got, members = self.results(parse_scheme("int3_g8"), 4)
        losses = np.stack([layer_loss(w, member, gram) for member in members])
        assert len(set(losses.argmin(axis=0))) > 1
        for column, chosen in enumerate(losses.argmin(axis=0)):
            first, second = np.sort(losses[:, column])[:2]
            assert first == second or second / first > 1 + 1e-5  # far above float32 rounding: the choice is clear
            jax.tree.map(
                lambda a, b, column=column: np.testing.assert_array_equal(a[..., column], b[..., column]),
                got,
                members[chosen],
            )

    def test_a_member_with_another_scale_of_the_matrix_is_left_out(self) -> None:
        w, gram, got, members = self.results(parse_scheme("int3_tensor"), 5)
        same = members[:2]  # HQQ's one scale is that of absmax
        assert [bool((m.scale == members[0].scale).all()) for m in members] == [True, True, False]
        losses = np.stack([layer_loss(w, member, gram) for member in same])
        np.testing.assert_allclose(layer_loss(w, got, gram), losses.min(axis=0), rtol=1e-5)

    def test_the_first_member_says_how_scales_are_chosen(self) -> None:
        assert [Best(m).scale for m in ((RTN("mse"), HQQ()), (HQQ(), RTN("mse")))] == ["mse", "absmax"]

    def test_no_members_are_refused(self) -> None:
        with pytest.raises(MpqError, match="best of no rounding algorithm"):
            Best(())
