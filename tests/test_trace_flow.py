"""What holds for branches, loops and experts beyond the laws of every case in `test_trace`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpq.calibrate import calibrate
from mpq.inputs import Dataset
from mpq.trace import trace
from mpq.types import MpqError, WeightSpec
from tests.trace_cases import normal, plain, tokens, x6
from tests.trace_cases_flow import EXPERTS, FLOW_CASES, convolve, dispatched_experts

identity = lambda site, x, w, default: default(x, w)
SQUARE = 6 * 6 * 6  # multiply-accumulates of 6 tokens and a 6 x 6 weight


def traced_case(name):
    case = FLOW_CASES[name]()
    traced = trace(case.fn, case.params, case.x)
    return case, traced if case.split is None else traced.split(case.split)


def counted(traced, params, x):
    """How often every weight is read, by `accumulate` under `jit`."""
    update = lambda site, x, counts: counts | {site.spec.path: counts[site.spec.path] + 1}
    zeros = {w.path: jnp.int32(0) for w in traced.weights}
    output, counts = jax.jit(lambda p, x: traced.accumulate(p, x, zeros, update))(params, x)
    return output, {path: int(count) for path, count in counts.items()}


def test_a_cond_counts_its_most_expensive_branch():
    def fn(p, x):
        cheap = lambda: x @ p["a"] + x @ p["shared"]
        nested = lambda: lax.cond(x[0, 0, 0] > 0, lambda: x @ p["b"], lambda: (x @ p["shared"]) @ p["shared"])
        return lax.switch(x[0, 0, 1].astype(int), [lambda: x, cheap, lambda: nested() @ p["c"]])

    case = plain(fn, dict.fromkeys(("a", "b", "c", "shared"), (6, 6)), x6)
    traced = trace(case.fn, case.params, case.x)
    assert {w.path: w.macs for w in traced.weights} == {"a": 0, "shared": 2 * SQUARE, "b": 0, "c": SQUARE}
    assert [use.macs for w in traced.weights if w.path == "shared" for use in w.uses] == [0, SQUARE, SQUARE]


def test_a_while_loop_counts_one_iteration():
    def fn(p, x):
        inner = lambda x: lax.scan(lambda c, _: (jnp.tanh(c @ p["b"]), None), x, length=5)[0]
        body = lambda c: (c[0] + 1, inner(jnp.tanh(c[1] @ p["a"])))
        return lax.scan(lambda c, _: (lax.while_loop(lambda c: c[0] < 3, body, (0, c))[1], None), x, length=2)[0]

    case = plain(fn, {"a": (6, 6), "b": (6, 6)}, x6)
    traced = trace(case.fn, case.params, case.x)
    assert {w.path: w.macs for w in traced.weights} == {"a": 2 * SQUARE, "b": 2 * 5 * SQUARE}
    output, counts = counted(traced, case.params, case.x)
    assert counts == {"a": 2 * 3, "b": 2 * 3 * 5}
    np.testing.assert_array_equal(output, jax.jit(case.fn)(case.params, case.x))


@pytest.mark.parametrize("sign", [1, -1])
def test_accumulate_sees_only_the_branches_that_run(sign):
    case, traced = traced_case("cond")
    x = sign * case.x
    positive = (x @ case.params["outside"]).sum() > 0
    output, counts = counted(traced, case.params, x)
    # Before the scan `a @ b`, or `b` and `outside`; the scan runs each of its branches once: none, `a`, `c`.
    first = {"outside": 1, "a": 1, "b": 1} if positive else {"outside": 2, "a": 0, "b": 1}
    assert counts == first | {"a": first["a"] + 1, "c": 1}
    np.testing.assert_array_equal(output, jax.jit(case.fn)(case.params, x))


def test_branches_and_loops_stay():
    for name in ("cond", "while"):
        case, traced = traced_case(name)
        replayed = jax.make_jaxpr(lambda p, x, t=traced: t.evaluate(p, x, identity))(case.params, case.x)
        assert primitives(replayed.jaxpr) == primitives(jax.make_jaxpr(case.fn)(case.params, case.x).jaxpr)


def primitives(jaxpr):
    """Names of all primitives inside; calls are inlined, and the index of a branch is clamped a second time."""
    names = []
    for eqn in jaxpr.eqns:
        names += [eqn.primitive.name] if eqn.primitive.name not in ("jit", "pjit", "clamp") else []
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple) else (value,):
                if hasattr(inner := getattr(sub, "jaxpr", sub), "eqns"):
                    names += primitives(inner)
    return names


def test_a_branch_shares_no_input_with_what_always_runs():
    """Their statistics differ, and one of them may be never taken."""
    fn = lambda p, x: x @ p["a"] + lax.cond(x.sum() > 0, lambda: x @ p["b"] + x @ p["c"], lambda: x @ p["d"])
    case = plain(fn, dict.fromkeys("abcd", (6, 6)), x6)
    groups = {w.path: w.group for w in trace(case.fn, case.params, case.x).weights}
    assert groups == {"a": "a", "b": "{b,c}", "c": "{b,c}", "d": "d"}


def dataset(x):
    """The inputs as a calibration set, without padding."""
    return Dataset(np.asarray(x), np.ones(x.shape[:2], bool), np.arange(len(x)), "test", "test")


def test_calibrates_a_branch_that_never_runs_to_zeros():
    fn = lambda p, x: x @ p["a"] + lax.cond((x * x).sum() < 0, lambda: x @ p["never"], lambda: x @ p["always"])
    case = plain(fn, dict.fromkeys(("a", "never", "always"), (6, 6)), x6)
    stats = calibrate(trace(case.fn, case.params, case.x), case.params, dataset(x6), batch_size=1)
    assert (stats["never"].num_tokens, stats["always"].num_tokens) == (0, 6)
    assert not stats["never"].gram.any()
    np.testing.assert_array_equal(stats["always"].gram, stats["a"].gram)


def test_calibrates_experts_one_by_one():
    case, whole = traced_case("dispatched_experts")
    split = whole.split()
    data = dataset(case.x)
    stack, each = (calibrate(traced, case.params, data, batch_size=2) for traced in (whole, split))
    for name in ("up", "gate", "down"):
        assert {s.num_tokens for path, s in each.items() if path.startswith(name)} == {6}
        for expert in range(3):  # exact: sums of small integers, and one division
            np.testing.assert_array_equal(each[f"{name}[{expert}]"].gram[0], stack[name].gram[expert])
            np.testing.assert_array_equal(each[f"{name}[{expert}]"].absmax[0], stack[name].absmax[expert])
    assert each["up[1]"] is each["gate[1]"]
    assert stack["up"].gram.shape == (3, 6, 6)


def test_one_expert_can_be_replaced_alone():
    case, whole = traced_case("dispatched_experts")
    traced = whole.split(["down"])
    assert [w.path for w in traced.weights] == ["router", "up", "gate", "down[0]", "down[1]", "down[2]"]
    (spec,) = (w for w in traced.weights if w.path == "down[1]")
    assert spec.to_matrix(case.params["down"]).shape == (1, 4, 6)
    changed = case.params | {"down": spec.from_matrix(-spec.to_matrix(case.params["down"]), case.params["down"])}
    np.testing.assert_array_equal(changed["down"][1], -case.params["down"][1])
    np.testing.assert_array_equal(changed["down"][::2], case.params["down"][::2])
    negate = lambda site, x, w, default: default(x, -w) if site.spec.path == "down[1]" else default(x, w)
    got = jax.jit(lambda p, x: traced.evaluate(p, x, negate))(case.params, case.x)
    np.testing.assert_array_equal(got, jax.jit(case.fn)(changed, case.x))
    assert not np.array_equal(got, jax.jit(case.fn)(case.params, case.x))


def test_a_gradient_flows_through_replaced_experts_and_branches():
    """Taps on every output, against a function written out by hand."""

    def fn(p, x):
        y = jnp.stack([x, 2 * x])
        return jnp.sin(lax.cond(x.sum() > 0, lambda: jnp.einsum("ebtk,ekn->ebtn", y, p["w"]), lambda: y))

    params, x = {"w": normal(2, 6, 6)}, abs(x6)
    traced = trace(fn, params, x).split()
    tapped = lambda taps: traced.evaluate(params, x, lambda site, x, w, d: d(x, w) + taps[site.spec.index[0]]).sum()
    by_hand = lambda taps: sum(jnp.sin((e + 1) * x @ params["w"][e] + taps[e]).sum() for e in range(2))
    taps = jnp.zeros((2, *x.shape))
    # The cosine of a float32 sum of six terms: six roundings of the sum of their magnitudes, and the cosine's own two.
    atol = (6 * 2 * (x @ abs(params["w"]).max(0)).max() + 2) * np.finfo(np.float32).eps
    np.testing.assert_allclose(jax.jit(jax.grad(tapped))(taps), jax.grad(by_hand)(taps), rtol=0, atol=atol)


def test_what_can_be_split():
    _, traced = traced_case("dense_experts")
    assert [w.path for w in traced.split().weights] == ["router", "up", "gate", "down[0]", "down[1]", "down[2]"]
    again = traced.split(["up"]).split()
    assert [w.path for w in again.weights if w.param != "router"] == [
        *("up[0]", "up[1]", "up[2]", "gate"),
        *("down[0]", "down[1]", "down[2]"),
    ]
    assert again.split() is again
    assert traced.split([]) is traced
    other = again.on((1, 3, 6))
    assert [dataclasses.replace(w, uses=()) for w in other.weights] == [
        dataclasses.replace(w, uses=()) for w in again.weights
    ]
    assert (
        sum(w.macs for w in again.weights)
        == sum(w.macs for w in traced.weights)
        == 2 * sum(w.macs for w in other.weights)
    )

    with pytest.raises(MpqError, match=r"`nothing` is not one of the 4 weights"):
        traced.split(["nothing"])
    with pytest.raises(MpqError, match=r"`router` cannot be divided into experts: .* \['down', 'gate', 'up'\]"):
        traced.split(["up", "router"])
    conv = trace(lambda p, x: convolve(x, p["w"], feature_group_count=6), {"w": normal(2, 1, 6)}, x6)
    with pytest.raises(MpqError, match="divisible are none"):
        conv.split(["w"])
    lookup = trace(lambda p, ids: p["w"][ids] @ p["w"].T, {"w": normal(11, 6)}, tokens(2, 3))
    with pytest.raises(MpqError, match="that only matmuls read"):
        lookup.split(["w"])


def test_one_scheme_for_all_or_one_for_each():
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in EXPERTS.items()}
    traced = trace(dispatched_experts, shapes, x6)
    assert [w.batch for w in traced.weights] == [1, 3, 3, 3]
    assert {w.batch for w in traced.split().weights} == {1}
    assert sum(w.size for w in traced.weights) == sum(w.size for w in traced.split().weights)


def test_slices_along_any_axis_survive_json():
    case, traced = traced_case("other_axes")
    for spec in traced.weights:
        assert WeightSpec.from_json(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec
    (spec,) = (w for w in traced.weights if w.path == "outer[1,:,:,0]")
    np.testing.assert_array_equal(spec.to_matrix(case.params["outer"])[0], case.params["outer"][1, :, :, 0])
    np.testing.assert_array_equal(case.params["outer"][spec.where], case.params["outer"][1, :, :, 0])
