"""Rounding to blocks of ggml: laws that hold for every type, and float64 oracles of the search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.allocate import Problem
from mpq.export import orbax
from mpq.formats.ggml import GGML_SCHEMES, sub_range
from mpq.quantize import GPTQ, QUANTIZERS, RTN, Candidates
from mpq.types import MpqError, QTensor, SensitivityTable, Use, WeightSpec

K, N = 512, 8
TWO_LEVELS = ("q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs")
EVERY = pytest.mark.parametrize("name", GGML_SCHEMES)


@functools.cache
def problem() -> tuple[jax.Array, jax.Array]:
    """Weights with columns of unequal size and a few outliers, a group of zeros and a block of zeros; and a gram."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((1, K, N)) * rng.uniform(0.02, 2, N)
    w += (rng.random(w.shape) < 0.01) * 4
    w[:, :32, 0] = w[:, 256:, 1] = 0
    mix = rng.standard_normal((K, K)) * 0.05 + np.eye(K)
    x = rng.standard_normal((800, K)) @ mix * np.exp(0.5 * rng.standard_normal(K))
    return jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x / 800, jnp.float32)[None]


@functools.cache
def rounded(name: str, method: str) -> QTensor:
    return RTN(method)(problem()[0], GGML_SCHEMES[name])


def errors(qtensor: QTensor) -> np.ndarray:
    """`float64[k]`, squared errors summed over columns."""
    return np.square(np.asarray(qtensor.dequantize(), np.float64) - np.asarray(problem()[0], np.float64)).sum((0, 2))


@EVERY
class TestEveryType:
    def test_stores_what_the_scheme_has_within_its_ranges(self, name):
        scheme, got = GGML_SCHEMES[name], rounded(name, "mse")
        assert got.scheme == scheme
        sizes = {"qvalue": scheme.format.bits, "scale": 8 if name == "mxfp4" else 16, "minimum": 16}
        sizes |= dict.fromkeys(("sub_scale", "sub_minimum"), scheme.blocks.sub_bits)
        bits = {part: a.size * width for part, width in sizes.items() if (a := getattr(got, part)) is not None}
        assert bits == scheme.part_bits(K, N)
        assert scheme.format.min_qvalue <= got.qvalue.min() <= got.qvalue.max() <= scheme.format.max_qvalue
        for integers in (got.sub_scale, got.sub_minimum):
            if integers is not None:
                low, high = sub_range(scheme.blocks)
                assert low <= integers.min() <= integers.max() <= high

    def test_codes_are_the_nearest_under_what_is_stored(self, name):
        got, w = rounded(name, "mse"), np.asarray(problem()[0], np.float64)
        step = np.asarray(got.spread(got.effective_scale), np.float64)
        offset = 0 if got.offset is None else np.asarray(got.spread(got.offset), np.float64)
        codes = np.arange(got.scheme.format.min_qvalue, got.scheme.format.max_qvalue + 1)
        levels = np.asarray(got.scheme.format.decode(jnp.asarray(codes, jnp.int8)), np.float64)
        best = np.abs(w[..., None] - (levels * step[..., None] + np.asarray(offset)[..., None])).min(axis=-1)
        here = np.abs(np.asarray(got.dequantize(), np.float64) - w)
        # A tie may fall either way: float32 moves the quotient by a few 2^-24 of at most 128 steps.
        assert (here <= best + 2**-16 * np.abs(step)).all()

    def test_a_power_of_two_scales_only_the_scales(self, name):
        w, _ = problem()
        got, scaled = rounded(name, "mse"), RTN("mse")(8 * w, GGML_SCHEMES[name])
        # Columns whose scales lie among the subnormal halves have other steps to choose from.
        normal = np.asarray((jnp.abs(got.scale) > 2**-14).all(axis=(0, 1)))
        np.testing.assert_array_equal(scaled.qvalue[..., normal], got.qvalue[..., normal])
        np.testing.assert_array_equal(scaled.dequantize()[..., normal], 8 * got.dequantize()[..., normal])
        assert normal.sum() >= N // 2

    def test_zeros_stay_zeros(self, name):
        got = np.asarray(rounded(name, "mse").dequantize())
        if name not in ("iq4_nl", "iq4_xs"):  # these have no level 0
            assert not got[:, 256:, 1].any()
        assert np.abs(got[:, 256:, 1]).max() <= 2**-17

    def test_what_does_not_fill_blocks_is_refused(self, name):
        for quantizer in (RTN(), GPTQ()):
            with pytest.raises(MpqError, match="rows of 48, no multiple of the"):
                quantizer(jnp.zeros((1, 48, 2)), GGML_SCHEMES[name], jnp.eye(48)[None])


def test_searching_beats_the_ends_of_the_range():
    assert errors(rounded("q4_k", "mse")).sum() < 0.95 * errors(rounded("q4_k", "absmax")).sum()


class TestGPTQ:
    scheme, gptq = GGML_SCHEMES["q4_k"], GPTQ(columns=N)

    def test_every_row_is_the_nearest_after_what_earlier_rows_left(self):
        """Babai's nearest plane in float64, each row after the errors that were really made before it."""
        w, gram = problem()
        got = self.gptq(w, self.scheme, gram)
        original = np.asarray(w[0], np.float64)
        target = original.copy()
        value = np.asarray(got.dequantize()[0], np.float64)
        h = np.asarray(gram[0], np.float64)
        h = h + self.gptq.damping * h.diagonal().mean() * np.eye(K)
        factor = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]  # upper triangular, factor factor^T = h
        for row in range(1, K):
            target[row] += factor[:row, row] @ (original - value)[:row] / factor[row, row]
        step = np.abs(np.asarray(got.spread(got.effective_scale)[0], np.float64))
        inside = np.asarray((got.qvalue[0] > 0) & (got.qvalue[0] < self.scheme.format.max_qvalue))
        # float32 sums of 512 terms move a target by a few thousandths of a step.
        assert (np.abs(target - value)[inside] <= 0.51 * step[inside]).all()
        assert inside.mean() > 0.7

    def test_loses_less_than_rounding(self):
        w, gram = problem()

        def loss(got: QTensor) -> np.ndarray:
            error = np.asarray(got.dequantize()[0] - w[0], np.float64)
            return np.einsum("kn,kl,ln->n", error, np.asarray(gram[0], np.float64), error)

        nearest, got = (loss(quantizer(w, self.scheme, gram)) for quantizer in (RTN("mse"), self.gptq))
        assert (got <= nearest * (1 + 1e-5)).all()  # losses in float32 decide between the two
        assert got.sum() < 0.9 * nearest.sum()


def test_the_search_finds_blocks_that_are_representable():
    """Blocks made of codes and integers that reach their ends come back as they were."""
    rng = np.random.default_rng(3)
    for name in TWO_LEVELS:
        scheme = GGML_SCHEMES[name]
        low, high = sub_range(scheme.blocks)
        groups = scheme.num_groups(K)
        integers = rng.integers(high // 2, high + 1, (2, groups, N))
        integers[:, :: groups // (K // 256)] = high if scheme.blocks.minimum else low
        codes = rng.integers(scheme.format.min_qvalue, scheme.format.max_qvalue + 1, (K, N))
        lowest, highest = scheme.format.min_qvalue, scheme.format.max_qvalue
        for row, code in enumerate((lowest, lowest + 1, highest)):  # no other step has these levels
            codes[row :: scheme.group_size] = code
        half = jnp.full((1, K // 256, N), 0.01, jnp.float16)
        sub = jnp.asarray(integers, jnp.int8)[:, None]
        minima = {"minimum": half, "sub_minimum": sub[1]} if scheme.blocks.minimum else {}
        made = QTensor(jnp.asarray(codes, jnp.int8)[None], half, None, scheme, sub_scale=sub[0], **minima)
        value = np.asarray(made.dequantize())
        got = np.asarray(RTN("mse")(jnp.asarray(value), scheme).dequantize())
        # The float16 of the block may come out one unit in its last place away, 2^-10 of the largest values at most.
        np.testing.assert_allclose(got, value, atol=2**-10 * np.abs(value).max(), err_msg=name)


def spec(path: str, k: int) -> WeightSpec:
    return WeightSpec(path, path, (), (k, 4), (0, 1), 1, k, 4, path, (Use("matmul", "0", 1),))


class TestSchemesThatDoNotFit:
    def test_are_no_candidates_and_never_allocated(self):
        specs = (spec("wide", 256), spec("narrow", 96))
        params = {s.path: jnp.ones((s.k, 4)) for s in specs}
        candidates, scheme = Candidates(params, specs, RTN()), GGML_SCHEMES["q4_k"]
        np.testing.assert_array_equal(candidates.dequantized(specs[1], scheme)[0], params["narrow"])
        with pytest.raises(MpqError, match="weight narrow has rows of 96, no multiple of the 256"):
            candidates.choose({"narrow": scheme})
        schemes = (scheme, GGML_SCHEMES["q8_0"])
        table = SensitivityTable(specs, schemes, np.zeros((2, 2)), np.zeros((2, 2)), "", "", "", "")
        np.testing.assert_array_equal(Problem.from_table(table).allowed, [[True, True], [False, True]])
        with pytest.raises(MpqError, match=r"rows of 96, which do not fill blocks of q4_k, and pin 'narrow'"):
            Problem.from_table(table, pins={"narrow": "q4_k"})


def test_the_orbax_export_keeps_every_bit_in_the_bytes_that_the_plan_says(tmp_path):
    specs = tuple(WeightSpec(n, n, (), (K, N), (0, 1), 1, K, N, n, (Use("matmul", "0", 1),)) for n in TWO_LEVELS)
    params = {s.path: problem()[0][0] for s in specs}
    qtensors = {name: rounded(name, "mse") for name in TWO_LEVELS}
    written = orbax.save(
        tmp_path / "out",
        params=params,
        stored={},
        weights=specs,
        qtensors=qtensors,
        plan_json={},
        config={},
        tokenizer_json=None,
    )
    assert 8 * written == sum(s.size_bits(GGML_SCHEMES[s.path]) for s in specs)
    read = orbax.load(tmp_path / "out").qtensors
    for name in TWO_LEVELS:
        for a, b in zip(jax.tree.leaves(read[name]), jax.tree.leaves(qtensors[name]), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("name", "start"), [("hqq", "rtn"), ("signround", "gptq")])
def test_integers_of_groups_are_learned_by_none(name, start):
    w, gram = problem()
    got, want = (QUANTIZERS[method](w, GGML_SCHEMES["q4_k"], gram) for method in (name, start))
    jax.tree.map(np.testing.assert_array_equal, got, want)
