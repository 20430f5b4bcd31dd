"""LLM.int8 against `Linear8bitLt` of bitsandbytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mpq.activations import activation_rows, parse_activation_scheme
from mpq.activations.apply import RoundedActivation
from mpq.formats import parse_scheme
from mpq.packed import evaluate_packed, pack_weights
from mpq.trace import trace
from mpq.types import QTensor

pytestmark = pytest.mark.parity
WIDTH, OUTPUTS, TOKENS = 64, 24, 40


@pytest.fixture(scope="module")
def layer():
    """A linear layer of bitsandbytes, and the same codes and scales here."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    rng = np.random.default_rng(0)
    linear = torch.nn.Linear(WIDTH, OUTPUTS, bias=False)
    linear.weight.data = torch.from_numpy(rng.normal(size=(OUTPUTS, WIDTH)).astype(np.float32))
    theirs = bnb.nn.Linear8bitLt(WIDTH, OUTPUTS, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    theirs(torch.zeros(1, WIDTH))  # what rounds its weight on a CPU
    codes, absmax = (np.asarray(part) for part in (theirs.state.CB, theirs.state.SCB))
    scheme = parse_scheme("int8_channel_sfloat32")
    ours = QTensor(jnp.asarray(codes.T[None]), jnp.asarray(absmax[None, None] / 127, jnp.float32), None, scheme)
    return theirs.eval(), ours


def run(qtensor, x):
    """The integer path on one window of tokens."""
    params = {"w": jax.ShapeDtypeStruct((WIDTH, OUTPUTS), jnp.float32)}
    traced = trace(lambda p, x: x @ p["w"], params, jax.ShapeDtypeStruct((1, *x.shape), jnp.float32))
    (row,) = activation_rows(traced)
    chosen = [RoundedActivation(row, parse_activation_scheme("int8_token_outlier6"))]
    packed = pack_weights(traced.weights, {"w": qtensor})
    return np.asarray(jax.jit(functools.partial(evaluate_packed, traced, activations=chosen))({}, packed, x[None])[0])


def inputs(seed=1):
    """Tokens whose largest value below 6 is 127/64, so that the scale of a token is 1/64 to the bit."""
    rng = np.random.default_rng(seed)
    x = np.clip(rng.normal(size=(TOKENS, WIDTH)), -1.9, 1.9).astype(np.float16)
    x[np.arange(TOKENS), rng.integers(10, WIDTH, TOKENS)] = 127 / 64
    x[:, 3], x[::7, 5], x[11, 8] = rng.choice([-1, 1], TOKENS) * rng.uniform(6, 40, TOKENS), 30, -6
    return x.astype(np.float32)


def test_the_product_is_that_of_bitsandbytes(layer):
    theirs, ours = layer
    x = inputs()
    with torch.no_grad():
        want = theirs(torch.from_numpy(x)).numpy()
    got = run(ours, x)
    # bitsandbytes 0.50 has 6.200124e-05 for 1 / 127^2 = 6.2000124e-05: its products of integers are 1.8e-5 too large.
    weight = np.asarray(ours.dequantize()[0], np.float64)
    outlier = (np.abs(x) >= 6).any(axis=0)
    integers = np.where(outlier, 0, np.round(x * 64.0) / 64) @ weight
    want = want - integers * (6.200124e-05 * 127**2 - 1)
    # The codes are the same, and sums of products exact in int32. What is left: float32 sums of the outliers' products
    # in another order, and the roundings of scales.
    bound = (2 * outlier.sum() + 10) * np.finfo(np.float32).eps * (np.abs(x) + 1 / 64) @ np.abs(weight)
    assert (np.abs(got - want) <= bound).all()
    assert np.abs(got - x @ weight).max() > 100 * bound.max()  # it is rounded


def test_small_values_beside_outliers_have_no_part_in_the_scale_here(layer):
    """A feature with an outlier is large elsewhere too: there bitsandbytes takes steps that are coarser than needed."""
    theirs, ours = layer
    x = inputs()
    x[:, 3] = 5.9
    x[0, 3] = 7.0
    with torch.no_grad():
        want = theirs(torch.from_numpy(x)).numpy()
    exact = x.astype(np.float64) @ np.asarray(ours.dequantize()[0], np.float64)
    error = lambda y: np.sqrt(np.mean((y - exact)[1:] ** 2))
    assert error(run(ours, x)) < 0.5 * error(want)  # of steps of 127/64 and of 5.9 over 127
