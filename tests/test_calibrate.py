import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpq.calibrate import _add, add_product, calibrate, count_lookups
from mpq.inputs import Dataset
from mpq.trace import trace
from mpq.types import MpqError
from tests.trace_cases import CASES, normal

EPS = np.finfo(np.float32).eps


def dataset(windows, time, lengths=None, vocab=11, seed=0):
    """Windows of random ids; window i has `lengths[i]` real positions."""
    inputs = np.random.default_rng(seed).integers(vocab, size=(windows, time)).astype(np.int32)
    mask = np.arange(time) < np.asarray(lengths if lengths is not None else [time] * windows)[:, None]
    return Dataset(inputs, mask, np.arange(windows, dtype=np.int32), "random ids", "digest")


def of_tokens(fn, params, time, batch=2):
    return trace(fn, params, jax.ShapeDtypeStruct((batch, time), jnp.int32))


def assert_gram(stats, rows, roundings):
    """`stats` has the second moments of float64 `rows[batch, tokens, k]`, up to `roundings` of float32 a product."""
    count = rows.shape[1]
    want = np.einsum("btk,btl->bkl", rows, rows) / count
    bound = roundings * EPS * np.einsum("btk,btl->bkl", np.abs(rows), np.abs(rows)) / count
    assert stats.num_tokens == count
    assert stats.gram.dtype == np.float32
    assert stats.gram.shape == want.shape
    assert (np.abs(stats.gram - want) <= bound).all()
    np.testing.assert_allclose(stats.absmax, np.abs(rows).max(axis=1), rtol=roundings * EPS)


def mlp(p, ids):
    x = p["table"][ids]
    return jnp.tanh(x @ p["up"]) @ p["down"]


MLP = {"table": normal(11, 6), "up": normal(6, 8), "down": normal(8, 4)}


def test_grams_of_real_positions_alone():
    data = dataset(5, 4, lengths=[4, 1, 0, 3, 2])
    stats = calibrate(of_tokens(mlp, MLP, 4), MLP, data, batch_size=2)
    x = np.asarray(MLP["table"], np.float64)[data.inputs[data.mask]]
    h = np.tanh(x @ np.asarray(MLP["up"], np.float64))
    assert stats.keys() == {"up", "down"}  # the table is only looked up
    # 8 summed positions a batch, two operands, and one rounding each for the mean and the cast.
    assert_gram(stats["up"], x[None], roundings=12)
    want = np.einsum("tk,tl->kl", h, h) / len(h)
    np.testing.assert_allclose(stats["down"].gram[0], want, rtol=0, atol=2 * hidden_error(x) + 12 * EPS)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_lookups_count_every_real_position_and_shared_ones_once_a_window(batch_size):
    positions = normal(4, 6)

    def fn(p, ids):
        x = p["table"][ids] + p["positions"][jnp.arange(ids.shape[1])]
        return jnp.tanh(x @ p["up"]) @ p["down"]

    data, params = dataset(5, 4, lengths=[4, 1, 0, 3, 2]), MLP | {"positions": positions}
    counts = count_lookups(of_tokens(fn, params, 4), params, data, batch_size)
    assert counts.keys() == {"table", "positions"}
    np.testing.assert_array_equal(counts["table"], np.bincount(data.inputs[data.mask], minlength=11))
    np.testing.assert_array_equal(counts["positions"], data.mask.sum(axis=0))


def hidden_error(x):
    """Bound on the float32 error of `tanh(x @ up)`: a 6-term sum, under slope 1 at most, and two roundings of tanh."""
    return EPS * (6 * (np.abs(x) @ np.abs(MLP["up"])).max() + 2)


def test_any_batching_gives_the_same_numbers():
    data = dataset(7, 4, lengths=[4, 2, 4, 1, 3, 0, 4])
    wants = calibrate(of_tokens(mlp, MLP, 4), MLP, data, batch_size=1)
    error = hidden_error(np.asarray(MLP["table"], np.float64))
    for batch_size in (2, 3, 10):
        stats = calibrate(of_tokens(mlp, MLP, 4, batch=3), MLP, data, batch_size)
        for path, inexact in [("up", 0.0), ("down", 2 * error)]:  # both runs round a hidden value, perhaps otherwise
            got, want = stats[path], wants[path]
            scale = np.sqrt(np.outer(np.diag(want.gram[0]), np.diag(want.gram[0])))  # bounds E|x_i x_j|
            # At most 28 positions, summed in one order or another; |hidden| <= 1.
            assert (np.abs(got.gram - want.gram) <= 2 * 28 * EPS * scale + 2 * inexact).all()
            np.testing.assert_allclose(got.absmax, want.absmax, rtol=0, atol=inexact)
            assert got.num_tokens == want.num_tokens == data.mask.sum()


def test_padding_never_counts(tiny_llama):
    """Whatever stands in it: the model is causal and the padding last, so real positions do not see it."""
    apply, params = tiny_llama
    data = dataset(3, 6, lengths=[6, 3, 1], vocab=96)
    changed = Dataset(np.where(data.mask, data.inputs, 95), data.mask, data.document, "other padding", "digest")
    traced = of_tokens(apply, params, 6)
    got, want = (calibrate(traced, params, d, batch_size=2) for d in (data, changed))
    for path, stats in want.items():
        np.testing.assert_array_equal(got[path].gram, stats.gram)
        np.testing.assert_array_equal(got[path].absmax, stats.absmax)
        assert stats.num_tokens == 10


def test_weights_of_a_group_share_one_array(tiny_llama):
    apply, params = tiny_llama
    traced = of_tokens(apply, params, 6)
    stats = calibrate(traced, params, dataset(2, 6, vocab=96), 2)
    assert stats.keys() == {w.path for w in traced.weights}  # the embedding too: it is tied
    first = {w.group: stats[w.path] for w in reversed(traced.weights)}
    assert len(first) == 2 * 4 + 1
    assert all(stats[w.path].gram is first[w.group].gram for w in traced.weights)
    assert stats["embed_tokens.embedding"].gram.shape == (1, 32, 32)


def test_sums_keep_what_float32_would_lose():
    """1e8 and then 299 ones: each one alone is below half a unit in the last place of the sum."""
    params = {"table": jnp.array([[1e4], [1.0]]), "w": jnp.ones((1, 2))}
    data = dataset(300, 1)
    ids = (np.arange(300)[:, None] > 0).astype(np.int32)
    data = Dataset(ids, data.mask, data.document, "a large value first", "digest")
    stats = calibrate(of_tokens(lambda p, ids: p["table"][ids] @ p["w"], params, 1), params, data, 1)
    np.testing.assert_allclose(stats["w"].gram, np.full((1, 1, 1), (1e8 + 299) / 300), rtol=EPS)


def test_one_compilation_serves_all_batches():
    before = _add._cache_size()
    calibrate(of_tokens(mlp, MLP, 4), MLP, dataset(7, 4), 2)
    assert _add._cache_size() == before + 1


def test_grouped_convolution_over_time():
    """Strided windows of a padded sequence: rows of windows that are all padding do not count."""
    fn = lambda p, ids: lax.conv_general_dilated(
        p["table"][ids], p["w"], (2,), [(1, 0)], dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=2
    )
    params = {"table": normal(11, 6), "w": normal(2, 3, 8)}
    data = dataset(3, 6, lengths=[6, 4, 0])
    traced = of_tokens(fn, params, 6)
    (spec,) = [w for w in traced.weights if w.path == "w"]
    assert (spec.batch, spec.k, spec.n) == (2, 6, 4)
    x = np.pad(np.asarray(params["table"], np.float64)[data.inputs[:2]], [(0, 0), (1, 0), (0, 0)])  # [2, 7, 6]
    rows = [x[i, t : t + 2, 3 * g : 3 * g + 3].reshape(6) for g in range(2) for i in range(2) for t in (0, 2, 4)]
    assert_gram(calibrate(traced, params, data, 2)["w"], np.reshape(rows, (2, 6, 6)), roundings=12)


def test_experts_have_a_gram_each():
    fn = lambda p, ids: jnp.einsum("ebtk,ekn->ebtn", p["table"][ids] * p["gain"][:, None, None], p["w"])
    params = {"table": normal(11, 6), "gain": normal(3, 6), "w": normal(3, 6, 4)}
    data = dataset(3, 4, lengths=[4, 2, 3])
    x = np.asarray(params["table"], np.float64)[data.inputs[data.mask]] * np.asarray(params["gain"])[:, None]
    assert_gram(calibrate(of_tokens(fn, params, 4), params, data, 2)["w"], x, roundings=14)


def test_a_weight_used_twice_has_the_mean_of_both_uses():
    fn = lambda p, ids: (p["a"][ids] @ p["w"], p["b"][ids] @ p["w"] + p["b"][ids] @ p["v"])
    params = {"a": normal(11, 6), "b": normal(11, 6, seed=1), "w": normal(6, 4), "v": normal(6, 4)}
    data = dataset(2, 4)
    stats = calibrate(of_tokens(fn, params, 4), params, data, 2)
    a, b = (np.asarray(params[name], np.float64)[data.inputs.reshape(-1)] for name in "ab")
    # `p["b"][ids]` is looked up twice in the jaxpr: two inputs of equal value, as far as a trace can tell.
    assert_gram(stats["w"], np.concatenate([a, b])[None], roundings=12)
    assert_gram(stats["v"], b[None], roundings=12)


@pytest.mark.parametrize("shape", ["time major", "flat", "pooled", "routed", "single"])
def test_which_rows_count(shape):
    def fn(p, ids):
        x = p["table"][ids]
        if shape == "time major":
            return x.swapaxes(0, 1) @ p["w"]
        if shape == "flat":
            return x.reshape(-1, 6) @ p["w"]
        if shape == "pooled":
            return x[:, 0] @ p["w"]
        if shape == "routed":
            return x.reshape(-1, 6)[:5] @ p["w"]
        return x[0, 0] @ p["w"]

    params = {"table": normal(11, 6), "w": normal(6, 2)}
    data = dataset(3, 4, lengths=[4, 2, 0])
    x = np.asarray(params["table"], np.float64)[data.inputs]
    rows = {
        "time major": x[data.mask],
        "flat": x[data.mask],
        "pooled": x[:2, 0],
        "routed": x.reshape(-1, 6)[:5],
        "single": x[0, :1],
    }[shape]
    stats = calibrate(of_tokens(fn, params, 4), params, data, batch_size=3)
    assert_gram(stats["w"], rows[None], roundings=12)


def test_scans_count_every_step():
    case = CASES["rnn"]()
    params = case.params | {"table": normal(11, 6)}
    fn = lambda p, ids: case.fn(p, p["table"][ids])
    data = dataset(3, 4)
    stats = calibrate(of_tokens(fn, params, 4), params, data, 2)  # the last batch is half filled up
    x = np.asarray(params["table"], np.float64)[data.inputs.reshape(-1)]
    assert_gram(stats["input"], x[None], roundings=16)
    assert stats["hidden"].num_tokens == 3 * 4


def test_names_the_weight_that_is_not_finite():
    data = dataset(3, 4)
    broken = MLP | {"up": MLP["up"].at[2, 3].set(jnp.nan)}
    with pytest.raises(MpqError, match="Weight up holds NaN"):
        calibrate(of_tokens(mlp, MLP, 4), broken, data, 2)
    stacked = {"stack": normal(2, 6, 6).at[1].set(jnp.inf), "table": MLP["table"]}
    by_layer = lambda p, ids: lax.scan(lambda c, w: (c @ w, None), p["table"][ids], p["stack"])[0]
    with pytest.raises(MpqError, match=r"Weight stack\[1\] holds"):
        calibrate(of_tokens(by_layer, stacked, 4), stacked, data, 2)

    overflows = lambda p, ids: jnp.exp(1000 * jnp.abs(p["table"][ids] @ p["up"])) @ p["down"]
    with pytest.raises(MpqError, match=r"input of weight down is not finite.* in batch 0 of random ids"):
        calibrate(of_tokens(overflows, MLP, 4), MLP, data, 2)

    def deep(
        p, ids
    ):  # the sixth of twelve products makes infinity; names of inputs do not sort in the order of execution
        x = p["table"][ids]
        for i in range(12):
            x = jnp.where(i == 5, jnp.inf, 1.0) * x @ p[f"w{i}"]
        return x

    layers = {f"w{i}": 0.1 * normal(6, 6, seed=i) for i in range(12)} | {"table": MLP["table"]}
    with pytest.raises(MpqError, match="input of weight w5 is not finite"):
        calibrate(of_tokens(deep, layers, 4), layers, data, 2)
    huge = MLP | {"table": MLP["table"] * 1e30}  # finite, but not its square
    with pytest.raises(MpqError, match="input of weight up is not finite, or too large"):
        calibrate(of_tokens(mlp, huge, 4), huge, data, 2)


def test_padding_may_hold_anything():
    """Values that are not finite where nothing counts are no error."""
    fn = lambda p, ids: jnp.where((ids == 10)[..., None], jnp.nan, p["table"][ids]) @ p["up"]
    data = dataset(3, 4, lengths=[4, 2, 1], vocab=10)
    data = Dataset(np.where(data.mask, data.inputs, 10), data.mask, data.document, data.source, data.digest)
    params = {"table": MLP["table"], "up": MLP["up"]}
    x = np.asarray(params["table"], np.float64)[data.inputs[data.mask]]
    assert_gram(calibrate(of_tokens(fn, params, 4), params, data, 2)["up"], x[None], roundings=12)


def test_user_errors():
    traced = of_tokens(mlp, MLP, 4)
    with pytest.raises(MpqError, match="batch_size is 0; it must be at least 1"):
        calibrate(traced, MLP, dataset(2, 4), 0)
    with pytest.raises(MpqError, match="random ids has no position that counts"):
        calibrate(traced, MLP, dataset(2, 4, lengths=[0, 0]), 2)


GRAM = """
import hashlib, numpy as np
from mpq.calibrate import add_product
rows = np.random.default_rng(0).normal(size=(1, 2049, 192)).astype(np.float32)
total, rest = add_product(*np.zeros((2, 1, 192, 192), np.float32), rows, rows)
print(hashlib.sha256(np.asarray(total) + np.asarray(rest)).hexdigest())
"""


def test_a_gram_is_the_same_to_the_bit_on_any_number_of_threads():
    """XLA divides a contraction over 2,049 tokens differently on 1 and on 8 threads."""
    run = lambda threads: subprocess.run(
        [sys.executable, "-c", GRAM], env=os.environ | {"NPROC": threads}, capture_output=True, text=True, check=True
    )
    assert run("1").stdout == run("8").stdout


def test_a_gram_is_the_sum_over_all_tokens():
    rows = np.random.default_rng(0).normal(size=(2, 259, 5)).astype(np.float32)
    exact = np.einsum("btk,btl->bkl", rows, rows, dtype=np.float64)
    total, rest = add_product(*jnp.zeros((2, 2, 5, 5)), jnp.asarray(rows), jnp.asarray(rows))
    assert not np.array_equal(rest, np.zeros_like(rest))  # what a single float32 would have lost
    np.testing.assert_allclose(total + rest, exact, rtol=1e-5, atol=1e-4)
