"""Parts of the decoder against float64 NumPy: rotary positions, attention, routing."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.models.decoders import ExpertsConfig
from mpq.models.decoders.experts import route
from mpq.models.decoders.modules import attend
from mpq.models.decoders.reading import windows_of
from mpq.models.decoders.rope import Rope, parse_rope
from mpq.types import MpqError


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "mrope"}, "'rope_scaling' has the type 'mrope': supported is 'default', 'linear'"),
        ({"factor": 2.0}, r"'rope_scaling' has \['factor'\]: a rope of type 'default' takes no further key"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 3}, r"\['beta_fast'\]: a rope of type 'linear' takes factor"),
        ({"type": "llama3", "factor": 2.0}, "'rope_scaling' lacks 'low_freq_factor': a rope of type 'llama3' needs it"),
    ],
)  # fmt: skip
def test_rotary_positions_that_are_not_understood_are_refused(parameters, message):
    with pytest.raises(MpqError, match=message):
        parse_rope(parameters, 16)


def test_rotary_positions_that_do_not_fit_a_head_are_refused():
    x = jnp.zeros((1, 3, 1, 6))
    with pytest.raises(MpqError, match="turn 3 of 6 features a head: the number must be even"):
        Rope(fraction=0.5)(x)
    long = parse_rope({"type": "su", "short_factor": [1.0], "long_factor": [2.0]}, 16)
    with pytest.raises(MpqError, match="longrope has 1 factors: a head that rotates 6 features needs 3"):
        long(x)


def plain_frequencies(theta, dim):
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def llama3_frequencies(theta, dim):
    """As `model.py` of Llama 3.1 has it, wave by wave; factor 8, low 1, high 4, original context 64."""
    result = []
    for f in plain_frequencies(theta, dim):
        wave = 2 * math.pi / f
        smooth = (64 / wave - 1) / (4 - 1)
        between = (1 - smooth) * f / 8 + smooth * f
        result.append(f if wave < 64 / 4 else f / 8 if wave > 64 / 1 else between)
    return np.array(result)


def yarn_frequencies(theta, dim):
    """YaRN, section 3.2, by turns; factor 4, original context 64, and bounds rounded to whole features."""
    bound = lambda turns: dim * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = max(math.floor(bound(32)), 0), min(math.ceil(bound(1)), dim - 1)
    share = [min(max((i - low) / (high - low), 0), 1) for i in range(dim // 2)]
    return np.array([f / 4 * s + f * (1 - s) for s, f in zip(share, plain_frequencies(theta, dim), strict=True)])


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0, 2.0, 4.0, 8.0], "long_factor": [3.0, 5.0, 7.0, 9.0]}
STRETCHED = 100.0 * (3 * 40 / 32 - 2) ** (8 / 6)
ROPES = {
    "default": ({}, plain_frequencies(100.0, 8), 1.0),
    "linear": ({"factor": 4.0}, plain_frequencies(100.0, 8) / 4, 1.0),
    "dynamic": ({"factor": 3.0}, plain_frequencies(STRETCHED, 8), 1.0),
    "llama3": (LLAMA3, llama3_frequencies(100.0, 8), 1.0),
    "yarn": (YARN, yarn_frequencies(100.0, 8), 0.1 * math.log(4) + 1),
    "yarn, weighed": (
        YARN | {"mscale": 2.0, "mscale_all_dim": 0.5},
        yarn_frequencies(100.0, 8),
        (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
    ),
    "yarn, given": (YARN | {"attention_factor": 1.5}, yarn_frequencies(100.0, 8), 1.5),
    "longrope, short": (
        LONG | {"original_max_position_embeddings": 40},
        plain_frequencies(100.0, 8) / [1, 2, 4, 8],
        1.0,  # the context is no longer than the original
    ),
    "longrope, long": (
        LONG | {"original_max_position_embeddings": 8},
        plain_frequencies(100.0, 8) / [3, 5, 7, 9],
        math.sqrt(1 + math.log(4) / math.log(8)),
    ),
    "longrope, given": (
        LONG | {"original_max_position_embeddings": 8, "attention_factor": 1.25},
        plain_frequencies(100.0, 8) / [3, 5, 7, 9],
        1.25,
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_positions_against_float64(name):
    """A context of 32 tokens, a window of 40, a head of 10 features of which 8 turn."""
    parameters, frequencies, magnitude = ROPES[name]
    kind = {"rope_type": name.split(",")[0], "rope_theta": 100.0, "partial_rotary_factor": 0.8}
    x = np.random.default_rng(0).normal(size=(1, 40, 2, 10)).astype(np.float32)
    got = parse_rope(kind | parameters, 32)(jnp.asarray(x))
    want = x.astype(np.float64)
    angle = np.arange(40)[:, None] * frequencies
    a, b = want[..., :4].copy(), want[..., 4:8].copy()
    cos, sin = magnitude * np.cos(angle)[:, None], magnitude * np.sin(angle)[:, None]
    want[..., :4], want[..., 4:8] = a * cos - b * sin, b * cos + a * sin
    np.testing.assert_allclose(got, want, atol=2e-5)  # 39 radians in float32 are off by 2e-6, times |x| below 5


def test_dynamic_scaling_changes_nothing_within_the_context():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 1, 8)), jnp.float32)
    plain, dynamic = parse_rope({}, 32), parse_rope({"type": "dynamic", "factor": 4.0}, 32)
    np.testing.assert_array_equal(plain(x), dynamic(x))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_against_a_loop(softcap, window, scale):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 7, heads, 5)) for heads in (6, 2, 2))
    want = np.zeros_like(q)
    for b, t, h in np.ndindex(2, 7, 6):
        seen = [s for s in range(t + 1) if window is None or t - s < window]
        scores = np.array([q[b, t, h] @ k[b, s, h // 3] for s in seen]) * (scale or 5**-0.5)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        want[b, t, h] = weights / weights.sum() @ v[b, seen, h // 3]
    single = lambda x: jnp.asarray(x, jnp.float32)
    got = attend(single(q), single(k), single(v), scale=scale, window=window, softcap=softcap)
    np.testing.assert_allclose(got, want, atol=1e-5)  # sums of at most 7 products of order one


@pytest.mark.parametrize("normalize", [False, True])
def test_routing_keeps_the_largest(normalize):
    experts = ExpertsConfig(5, 2, 8, normalize, (True,))
    logits = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    got = np.asarray(route(jnp.asarray(logits), experts))
    share = np.exp(logits.astype(np.float64))
    share /= share.sum(-1, keepdims=True)
    for index in np.ndindex(3, 4):
        best = sorted(range(5), key=lambda e: -share[index][e])[:2]
        want = np.where(np.isin(np.arange(5), best), share[index], 0)
        np.testing.assert_allclose(got[index], want / want.sum() if normalize else want, atol=1e-6)
    assert ((got > 0).sum(-1) == 2).all()


def test_windows_follow_the_kinds_of_layers():
    assert windows_of(["sliding_attention", "full_attention"], 7, 2) == (7, None)
