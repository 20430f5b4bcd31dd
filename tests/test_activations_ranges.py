"""Calibrated ranges: counts and ends against NumPy on the very values, and clips against slow searches."""

import dataclasses

import numpy as np
import pytest

from mpq.activations import parse_activation_scheme
from mpq.activations.clip import choose_range
from mpq.activations.range_file import load_ranges, merge_ranges, save_ranges
from mpq.activations.ranges import BINS, ActivationRange, calibrate_activations, drifting, rebinned
from mpq.activations.rows import ActivationSpec
from mpq.types import MpqError
from tests.activation_cases import HEADS, double, logits_of, make_data, make_model, rows_of, traced

SPEC = ActivationSpec("x", "activation", "at", ("w",), 1, 4, 0)


def calibrated(of="activations", data=None, batch_size=4, model=None):
    model = make_model() if model is None else model
    return calibrate_activations(
        model, traced(model), rows_of(of, model), make_data(10) if data is None else data, batch_size=batch_size
    )


def of_values(windows, spec=SPEC, parts=1):
    """The range that calibration on `[windows, parts, values]` gives, by NumPy's own histogram."""
    largest = np.abs(windows).max()
    exponent = int(np.frexp(largest)[1])
    edges = np.linspace(-(2.0**exponent), 2.0**exponent, BINS + 1)
    counts = np.stack([np.histogram(windows[:, part], edges)[0] for part in range(parts)])
    width = np.abs(windows).reshape(-1, spec.width).max(axis=0)
    return ActivationRange(spec, counts, exponent, windows.min(axis=2), windows.max(axis=2), width)


@pytest.mark.parametrize("of", ["activations", "kv"])
def test_counts_and_ends_are_those_of_the_values(of):
    model, data = make_model(), make_data(10)
    seen = {}
    logits_of(double(model.params), data.inputs, lambda name, x: seen.setdefault(name, x))
    for path, found in calibrated(of, data).items():
        parts = HEADS if of == "kv" else 1
        windows = [seen[path][w][data.mask[w]].reshape(-1, parts, seen[path].shape[-1] // parts) for w in range(10)]
        # float32 against float64: ends differ by rounding, and a value may lie in the bin beside
        np.testing.assert_allclose(found.low, [w.min(axis=(0, 2)) for w in windows], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.high, [w.max(axis=(0, 2)) for w in windows], rtol=1e-5, atol=1e-6)
        values = np.concatenate(windows)
        assert found.exponent == np.frexp(max(map(abs, found.extremes)))[1]
        np.testing.assert_allclose(found.largest, np.abs(seen[path][data.mask]).max(axis=0), rtol=1e-5)
        for part in range(parts):
            bins = np.floor(values[:, part] * (BINS / 2) / 2.0**found.exponent).astype(int) + BINS // 2
            below, expected = (np.cumsum(n) for n in (found.counts[part], np.bincount(bins.ravel(), minlength=BINS)))
            assert (expected[:-1] <= below[1:]).all()
            assert (below[:-1] <= expected[1:]).all()
            assert below[-1] == expected[-1]


def test_batching_changes_no_bit_and_padding_does_not_count():
    data = make_data(10)
    poisoned = dataclasses.replace(data, inputs=np.where(data.mask, data.inputs, 6 - data.inputs))
    whole = calibrated(data=data)
    for other in (calibrated(data=data, batch_size=3), calibrated(data=poisoned)):
        for path, found in whole.items():
            assert found.exponent == other[path].exponent
            for name in ("counts", "low", "high", "largest"):
                np.testing.assert_array_equal(getattr(found, name), getattr(other[path], name))


def test_a_histogram_that_grew_is_that_of_the_final_ends():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 1, 4096)) * 0.3
    small, large = of_values(x), of_values(np.concatenate([x, np.full_like(x, 37.0)]))
    grown = rebinned(small.counts, large.exponent - small.exponent)
    grown[0, int(37.0 * (BINS / 2) / 2.0**large.exponent) + BINS // 2] += x.size
    np.testing.assert_array_equal(grown, large.counts)
    assert rebinned(small.counts, 200)[0, BINS // 2 - 1] == (x < 0).sum()


def test_files_are_read_back_and_merge_to_the_whole(tmp_path):
    model, data = make_model(), make_data(10)
    part = lambda rows: dataclasses.replace(
        data, inputs=data.inputs[rows], mask=data.mask[rows], document=data.document[rows]
    )
    whole, halves = calibrated(data=data), [calibrated(data=part(slice(0, 4))), calibrated(data=part(slice(4, 10)))]
    for number, ranges in enumerate(halves):
        save_ranges(tmp_path / str(number), ranges, "m", [f"d{number}"])
    files = {tmp_path / str(n): load_ranges(tmp_path / str(n)) for n in range(2)}
    merged = merge_ranges(files)
    assert merged.data_digests == ("d0", "d1")
    for path, found in whole.items():
        assert found.exponent == merged.ranges[path].exponent
        assert found.spec == merged.ranges[path].spec
        for name in ("counts", "low", "high", "largest"):
            np.testing.assert_array_equal(getattr(found, name), getattr(merged.ranges[path], name))
    save_ranges(tmp_path / "other", calibrated("kv", data), model.digest, ["d0"])
    both = merge_ranges({tmp_path / "other": load_ranges(tmp_path / "other")._replace(model_digest="m"), **files})
    assert both.ranges.keys() == {"key", "value", *whole}
    first = next(iter(whole))
    with pytest.raises(MpqError, match=f"again holds {first} of data that another file has counted: give each data"):
        merge_ranges({**files, tmp_path / "again": files[tmp_path / "0"]})
    with pytest.raises(MpqError, match=r"is of another model than .*0 \(digest x, not m\): merge ranges of one model"):
        merge_ranges({**files, tmp_path / "x": files[tmp_path / "0"]._replace(model_digest="x")})
    with pytest.raises(MpqError, match=r"ranges of x and of .* cannot be merged: they differ"):
        of_values(np.ones((2, 1, 4))).merged(whole[first])


def heavy_tailed(seed=0, windows=20):
    """Values with a few outliers, as activations have them; `[windows, 1, values]`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(windows, 1, 2000)) * np.exp(rng.normal(size=(windows, 1, 1)) * 0.2)
    x[:, :, :2] *= 12
    return x


def ends(x, text):
    return [float(end[0]) for end in choose_range(of_values(x), parse_activation_scheme(text), "x")]


def squared_error(x, low, high, scheme):
    """Of rounding all values to the scheme's levels between two ends, in float64."""
    levels = scheme.top if scheme.asymmetric else 2 * scheme.top
    step = (high - low) / levels
    zero = np.round(-low / step)
    least, top = (0, scheme.top) if scheme.asymmetric else (-scheme.top, scheme.top)
    zero = zero if scheme.asymmetric else 0
    return float(np.mean((x - (np.clip(np.round(x / step) + zero, least, top) - zero) * step) ** 2))


@pytest.mark.parametrize("text", ["int4_tensor_static", "int8_tensor_static", "int4_tensor_static_asym"])
def test_mse_has_the_least_error_of_all_shares(text):
    x, scheme = heavy_tailed() + (1.5 if text.endswith("asym") else 0), parse_activation_scheme(text)
    low, high = min(x.min(), 0), max(x.max(), 0)
    low, high = (low, high) if scheme.asymmetric else (-max(high, -low), max(high, -low))
    best = min(squared_error(x, low * i / 128, high * i / 128, scheme) for i in range(1, 129))
    # Every value is off by at most half a bin, h; so is its error e, and (e + h)^2 <= e^2 + 2 h |e| + h^2.
    h = 2.0 ** int(np.frexp(np.abs(x).max())[1]) / BINS
    got = squared_error(x, *ends(x, text), scheme)
    assert best <= got * (1 + 1e-9)
    assert got <= best + 2 * (2 * h * np.sqrt(best) + h * h)
    assert got < 0.9 * squared_error(x, low, high, scheme) or scheme.bits == 8


def test_absmax_and_percentile_and_moving_average():
    x = heavy_tailed()
    assert ends(x, "int8_tensor_static_absmax") == [-np.float32(np.abs(x).max()), np.float32(np.abs(x).max())]
    assert ends(x, "int8_tensor_static_absmax_asym") == [np.float32(x.min()), np.float32(x.max())]
    width = 2.0 ** (int(np.frexp(np.abs(x).max())[1]) + 1) / BINS
    clipped = np.quantile(np.abs(x), 1 - 1e-4, method="inverted_cdf")
    assert clipped <= ends(x, "int8_tensor_static_percentile")[1] <= clipped + width
    low, high = ends(x, "int8_tensor_static_percentile_asym")
    assert -width <= low + np.quantile(-x, 1 - 5e-5, method="inverted_cdf") <= width
    assert -width <= high - np.quantile(x, 1 - 5e-5, method="inverted_cdf") <= width
    weights = np.array([0.9**19, *(0.1 * 0.9 ** (19 - np.arange(1, 20)))])
    assert weights.sum() == pytest.approx(1)
    expected = (weights * x.max(axis=(1, 2))).sum()
    assert ends(x, "int8_tensor_static_moving_average_asym")[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_entropy_is_that_of_the_published_procedure(bits):
    """Bin by bin in Python, over the same numbers of bins."""
    x, levels = np.abs(heavy_tailed()) ** 1.5, 2 ** (bits - 1)
    found = of_values(x)
    bins = [int(n) for n in found.counts[0, BINS // 2 :]]
    bins[0] = bins[1]
    used = max(i for i, n in enumerate(bins) if n) + 1
    best = (np.inf, 0)
    for kept in [*range(levels, used, 16), used]:
        p = [float(n) for n in bins[:kept]]
        p[-1] += sum(bins[kept:])
        q = [0.0] * kept
        for level in range(levels):
            members = [i for i in range(kept) if i * levels // kept == level and bins[i]]
            for i in members:
                q[i] = sum(bins[j] for j in members) / len(members)
        total_p, total_q, kl = sum(p), sum(q), 0.0
        for a, b in zip(p, q, strict=True):
            if a:
                kl += np.inf if not b else a / total_p * np.log(a / total_p * total_q / b)
        best = min(best, (kl, kept))
    width = 2.0 ** (found.exponent + 1) / BINS
    assert ends(x, f"int{bits}_tensor_static_entropy")[1] == pytest.approx(min(best[1] * width, x.max()), rel=1e-6)
    assert best[1] < used


def test_heads_have_ranges_of_their_own():
    x = np.random.default_rng(0).normal(size=(10, 2, 50)) * np.array([1.0, 5.0])[:, None]
    spec = dataclasses.replace(SPEC, kind="kv", heads=2)
    low, high = choose_range(of_values(x, spec, 2), parse_activation_scheme("int8_head_static_absmax"), "x")
    np.testing.assert_array_equal(high, np.abs(x).max(axis=(0, 2)).astype(np.float32))
    np.testing.assert_array_equal(low, -high)
    (whole,) = choose_range(of_values(x, spec, 2), parse_activation_scheme("int8_tensor_static_absmax"), "x")[1]
    assert whole == high.max()


def test_what_has_no_range_is_refused():
    static = parse_activation_scheme("int8_tensor_static")
    with pytest.raises(
        MpqError,
        match=r"^x at int8_tensor_static has no calibrated range: run mpq calibrate --of activations \(or kv\), or "
        "give a dynamic scheme such as int8_token$",
    ):
        choose_range(None, static, "x")
    with pytest.raises(
        MpqError,
        match=r"^x at int8_tensor_static had the single value 2 in all 8 places of the calibration data: no range can "
        "be told from that; calibrate on other data, or take a dynamic scheme$",
    ):
        choose_range(of_values(np.full((2, 1, 4), 2.0)), static, "x")
    empty = ActivationRange(
        SPEC, np.zeros((1, BINS), np.int64), 0, np.full((2, 1), np.inf), -np.full((2, 1), np.inf), np.zeros(4)
    )
    with pytest.raises(
        MpqError,
        match=r"^x at int8_tensor_static: the row was never computed on the calibration data; calibrate on data "
        "that reaches it, or take a dynamic scheme$",
    ):
        choose_range(empty, static, "x")


def test_drift_between_the_halves_is_told_and_chance_is_not():
    same = np.random.default_rng(0).normal(size=(40, 1, 500))
    assert of_values(same).drift is None
    assert drifting({"x": of_values(same)}) == []
    shifted = np.concatenate([same[:20], 1.5 * same[20:]])
    drift = of_values(shifted).drift
    means = np.exp(np.log(np.abs(shifted).max(axis=(1, 2))).reshape(2, 20).mean(axis=1))
    assert drift == pytest.approx(means[1] / means[0] - 1)
    (said,) = drifting({"x": of_values(shifted)})
    assert said == (
        f"x: its range is {100 * drift:+.0f} % in the later half of the calibration data; calibrate on more of what "
        "the model will see, or take a dynamic scheme"
    )
    (few,) = drifting({"x": of_values(same[:7])})
    assert few == "x: 7 windows are few to know a range from; calibrate on 8 or more"


def test_values_that_are_not_finite_are_named():
    model = make_model()
    factor = 3e38 / float(np.abs(model.params["down"]).max())
    huge = dataclasses.replace(model, params=model.params | {"down": model.params["down"] * factor})
    with pytest.raises(MpqError, match=r"^a value of head is not finite in batch 0 of noise: check the model on these"):
        calibrated(model=huge)


@pytest.mark.parametrize(
    "text", ["int8_tensor_static", "int4_head_static_absmax", "int2_tensor_static_percentile_asym"]
)
def test_texts_of_static_schemes(text):
    assert str(parse_activation_scheme(text)) == text
    assert parse_activation_scheme("int8_tensor_static_mse") == parse_activation_scheme("int8_tensor_static")


WRONG = {
    "int8_token_static": "'int8_token_static': tokens to come are not known in advance; a static range is of a tensor "
    "or a head",
    "int8_tensor_static_entropy_asym": "'int8_tensor_static_entropy_asym': entropy chooses a range symmetric about 0; "
    "leave out _asym, or take mse",
    "int8_tensor_static_best": "unknown activation scheme 'int8_tensor_static_best': allowed is int2 to int8 or "
    "fp8_e4m3 with _token, _head, _tensor or _gN for groups of N features, and _asym for a zero point: int8_token, "
    "int4_head_asym, int4_g32; _static after tensor or head, and a method of mse, absmax, moving_average, percentile, "
    "entropy: int8_tensor_static, int8_head_static_percentile; "
    "_outlier6 after token for features that reach 6 in floating point: int8_token_outlier6, and those of calibration: "
    "int8_token_outlier6_static",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=WRONG.keys())
def test_texts_that_mean_nothing_are_refused(text, message):
    with pytest.raises(MpqError) as refused:
        parse_activation_scheme(text)
    assert str(refused.value) == message
