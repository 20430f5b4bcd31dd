import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from mpq.models import functional
from mpq.models.llama import Llama, LlamaConfig
from mpq.trace import trace
from mpq.tracing import layout
from mpq.tracing.found import group_name
from mpq.tracing.walk import Walk
from mpq.types import MpqError
from tests import trace_cases
from tests.trace_cases import normal, plain, tokens
from tests.trace_cases_flax import FLAX_CASES
from tests.trace_cases_flow import FLOW_CASES

CASES = {**trace_cases.CASES, **FLAX_CASES, **FLOW_CASES}
identity = lambda site, x, w, default: default(x, w)


@functools.cache
def case_of(name):
    case = CASES[name]()
    traced = trace(case.fn, case.params, case.x)
    return case, traced if case.split is None else traced.split(case.split)


@pytest.fixture(params=CASES)
def traced_case(request):
    return case_of(request.param)


def test_finds_the_weights(traced_case):
    case, traced = traced_case
    found = [(w.path, w.batch, w.k, w.n, w.kind, w.group) for w in traced.weights]
    assert found == [(*weight[:-1], weight[-1] or weight[0]) for weight in case.weights]


def test_says_why_every_other_parameter_is_no_weight(traced_case):
    case, traced = traced_case
    assert {s.path: s.reason for s in traced.skipped} == case.skipped
    assert {w.param for w in traced.weights} | {s.path for s in traced.skipped} == case.params.keys()


@pytest.fixture(
    params=sorted(CASES.keys() - {"llama_untied", "nnx_attention", "linen_computed_kernels", "ragged"})
)  # without those that are slow to compile and nothing new, and what JAX cannot vmap
def law_case(request):
    return case_of(request.param)


def test_identity_replacement_is_bit_identical(law_case):
    """Under jit, grad and vmap together."""
    case, traced = law_case
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), case.x)

    def outputs_and_gradient(fn):
        outputs = lambda p: jax.vmap(fn, (None, 0))(p, stacked)
        loss = lambda p: (lambda y: ((y**2).sum(), y))(outputs(p))
        if case.gradient == "none":
            return jax.jit(outputs)(case.params), {}
        if case.gradient == "forward":
            y, tangent = jax.jit(lambda p: jax.jvp(outputs, (p,), (p,)))(case.params)
            return y, {"forward": tangent}
        gradient, y = jax.jit(jax.grad(loss, has_aux=True))(case.params)
        return y, gradient

    want, want_gradient = outputs_and_gradient(case.fn)
    got, gradient = outputs_and_gradient(lambda p, x: traced.evaluate(p, x, identity))
    np.testing.assert_array_equal(got, want)
    # Unrolled, a gradient is a float32 sum of at most the 36 terms of 3 steps: in another order, 36 roundings each.
    eps = 3 * 36 * np.finfo(np.float32).eps if case.gradient == "rounded" else 0
    for name, value in gradient.items():
        atol = eps * np.abs(want_gradient[name]).max()
        np.testing.assert_allclose(value, want_gradient[name], rtol=0, atol=atol, err_msg=name)


def test_matrices_of_every_site_multiply(law_case):
    """The law that pins the canonical view down: inputs_matrix @ to_matrix == outputs_matrix."""
    case, traced = law_case
    seen = []

    def record(site, x, weight, canonical, y, y_again, y_matrix):
        seen.append(site)
        np.testing.assert_array_equal(y_again, y)
        if site.use.kind == "embedding":
            np.testing.assert_array_equal(y_matrix[0], weight[0].T[x.reshape(-1)])
            return
        np.testing.assert_array_equal(weight, canonical)
        assert x.shape == (site.spec.batch, np.prod(site.token_shape, dtype=int), site.spec.k)
        x, weight, y_matrix = (np.asarray(a, np.float64) for a in (x, weight, y_matrix))
        # Float32 sums of k products in any order, and one rounding to the output's dtype (bfloat16 in one case).
        eps = site.spec.k * np.finfo(np.float32).eps + float(jnp.finfo(y.dtype).eps)
        assert (np.abs(x @ weight - y_matrix) <= eps * (np.abs(x) @ np.abs(weight)) + 1e-30).all(), site

    @jax.jit
    def tapped(params, x):
        def tap(site, x, w, default):
            y = default(x, w)
            y_matrix = site.outputs_matrix(y)
            x_matrix = x if site.use.kind == "embedding" else site.inputs_matrix(x)
            canonical = site.spec.to_matrix(params[site.spec.param]).astype(w.dtype)
            values = x_matrix, site.weights_matrix(w), canonical, y, site.from_outputs_matrix(y_matrix), y_matrix
            jax.debug.callback(lambda *a: record(site, *map(np.asarray, a)), *values)
            return y

        return traced.evaluate(params, x, tap)

    for sign in (1, -1):  # branches depend on the sign of a sum
        signed = lambda x, s=sign: s * x if jnp.issubdtype(x.dtype, jnp.floating) else x
        jax.block_until_ready(tapped(case.params, jax.tree.map(signed, case.x)))
    jax.effects_barrier()
    assert {site.id for site in seen} == {site.id for site in traced.sites}
    assert {site.spec.path for site in seen} == {w.path for w in traced.weights}


def test_windows_of_a_convolution_are_copies():
    """Of codes as of floats, and what is no number stays in the windows that see it."""
    conv = lambda p, x: lax.conv_general_dilated(x, p["w"], (2,), [(1, 0)], dimension_numbers=("NWC", "WIO", "NWC"))
    (site,) = trace(conv, {"w": jnp.ones((3, 2, 4))}, jnp.ones((1, 6, 2))).sites
    codes = jnp.arange(12, dtype=jnp.int8).reshape(1, 6, 2)
    windows = site.inputs_matrix(codes)
    assert windows.dtype == jnp.int8
    expected = [[0, 0, 0, 1, 2, 3], [2, 3, 4, 5, 6, 7], [6, 7, 8, 9, 10, 11]]
    np.testing.assert_array_equal(windows[0], expected)
    broken = codes.astype(jnp.float32).at[0, 5, 0].set(jnp.nan)
    np.testing.assert_array_equal(np.isnan(site.inputs_matrix(broken)[0]).any(axis=-1), [False, False, True])


def test_replaced_reads_equal_a_replaced_parameter(law_case):
    case, traced = law_case

    @jax.jit
    def halved_and_back(params):
        halved, back = dict(params), dict(params)
        for spec in traced.weights:
            halved[spec.param] = spec.from_matrix(0.5 * spec.to_matrix(params[spec.param]), halved[spec.param])
            back[spec.param] = spec.from_matrix(spec.to_matrix(halved[spec.param]) * 2, back[spec.param])
        return halved, back

    params, back = halved_and_back(case.params)
    jax.tree.map(np.testing.assert_array_equal, back, case.params)
    halve = lambda site, x, w, default: default(x, w * jnp.asarray(0.5, w.dtype))  # a power of two: exact in any dtype
    model = jax.jit(case.fn)
    got = jax.jit(lambda p, x: traced.evaluate(p, x, halve))(case.params, case.x)
    if not traced.weights:
        return
    if not any(s.reason.startswith("in part: also") for s in traced.skipped):
        # Halving is exact, but the two are different programs: XLA may sum a matmul in a loop's body in another order,
        # which moves a dot product of up to 24 terms by a few units in the last place of the largest.
        want = np.asarray(model(params, case.x))
        largest = np.abs(want.astype(np.float64)).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=8 * float(jnp.finfo(want.dtype).eps) * largest)
    assert not np.allclose(got, model(case.params, case.x), rtol=1e-2, atol=0)


def test_the_gradient_of_a_tap_is_the_gradient_of_the_output_it_is_added_to():
    """What a Fisher metric needs, through rematerialization, an unrolled scan, a kept scan and a lookup."""

    def fn(p, ids):
        x = jax.checkpoint(lambda x: jnp.tanh(x @ p["a"]))(p["table"][ids])
        x, _ = lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, p["stack"])
        return lax.scan(lambda c, _: (jnp.sin(c @ p["a"]), None), x, length=2)[0]

    def by_hand(p, ids, taps):
        x = jnp.tanh((p["table"][ids] + taps[0]) @ p["a"] + taps[1])
        for i in range(2):
            x = jnp.sin(x @ p["stack"][i] + taps[2 + i])
        for _ in range(2):
            x = jnp.sin(x @ p["a"] + taps[4])
        return x

    params, ids = {"table": normal(11, 6), "a": normal(6, 6), "stack": normal(2, 6, 6)}, tokens(2, 3)
    traced = trace(fn, params, ids)
    assert [site.spec.path for site in traced.sites] == ["table", "a", "stack[0]", "stack[1]", "a"]
    taps = {site.id: jnp.zeros(site.output.shape, site.output.dtype) for site in traced.sites}
    tapped = lambda t: traced.evaluate(params, ids, lambda site, x, w, default: default(x, w) + t[site.id])
    got = jax.jit(jax.grad(lambda t: tapped(t).sum()))(taps)
    want = jax.grad(lambda t: by_hand(params, ids, t).sum())([taps[site.id] for site in traced.sites])
    for site, expected in zip(traced.sites, want, strict=True):
        # Six layers deep with 6-term sums: at most 36 roundings along a path, of values no larger than the largest.
        atol = 36 * np.finfo(np.float32).eps * max(1, np.abs(expected).max())
        np.testing.assert_allclose(got[site.id], expected, rtol=0, atol=atol, err_msg=site.spec.path)


def test_a_derivative_rule_is_kept_until_a_read_inside_it_changes():
    case, traced = case_of("custom_vjp")
    gradient = lambda fn: jax.jit(jax.grad(lambda p: fn(p).sum()))(case.params)["a"]
    same = gradient(lambda p: traced.evaluate(p, case.x, identity))
    changed = gradient(lambda p: traced.evaluate(p, case.x, lambda site, x, w, default: default(x, w) * 1))
    np.testing.assert_array_equal(same, gradient(lambda p: case.fn(p, case.x)))  # the rule doubles it
    np.testing.assert_array_equal(changed, same / 2)  # the body's own derivative; halving is exact


def test_rematerialization_and_scans_over_other_things_stay():
    policy = jax.checkpoint_policies.dots_saveable
    fn = lambda p, x: jax.checkpoint(lambda x: x @ p["w"], policy=policy, prevent_cse=False)(x)
    operations = lambda fn, params, x: [
        (eqn.primitive.name, eqn.params.get("policy"), eqn.params.get("prevent_cse"), eqn.params.get("length"))
        for eqn in jax.make_jaxpr(fn)(params, x).eqns
    ]
    for case in (plain(fn, {"w": (6, 6)}, normal(2, 6)), CASES["rnn"]()):
        traced = trace(case.fn, case.params, case.x)
        replayed = operations(lambda p, x, t=traced: t.evaluate(p, x, identity), case.params, case.x)
        assert replayed == operations(case.fn, case.params, case.x)


def test_accumulate_threads_its_state_through_scans_and_rematerialization():
    case, traced = case_of("rnn")
    count = lambda site, x, state: state | {site.spec.path: state[site.spec.path] + site.inputs_matrix(x).sum()}
    zeros = {"input": jnp.zeros(()), "hidden": jnp.zeros(())}
    output, state = jax.jit(lambda p, x: traced.accumulate(p, x, zeros, count))(case.params, case.x)
    np.testing.assert_array_equal(output, jax.jit(case.fn)(case.params, case.x))
    np.testing.assert_allclose(state["input"], case.x.sum(), rtol=36 * 1.2e-7)  # a float32 sum of 36 terms

    case, traced = case_of("linen_scan_remat_tied")
    _, state = jax.jit(lambda p, x: traced.accumulate(p, x, jnp.int32(0), lambda site, x, n: n + 1))(
        case.params, case.x
    )
    assert state == len(traced.sites) == 10  # a lookup, 2 blocks of 4, the head


def test_a_replacement_may_depend_on_what_was_carried_to_it():
    case, traced = case_of("linen_scan_remat_tied")
    scaled = lambda site, x, w, default, n: (default(x, w) * (1 + n / 8), n + 1)
    output, count = jax.jit(lambda p, x: traced.carry(p, x, jnp.float32(0), scaled))(case.params, case.x)
    by_number = lambda site, x, w, default: default(x, w) * (1 + site.id / 8)
    want = jax.jit(lambda p, x: traced.evaluate(p, x, by_number))(case.params, case.x)
    assert count == len(traced.sites)
    np.testing.assert_allclose(output, want, rtol=1e-5, atol=1e-5)  # compiled otherwise


def test_counts_multiply_accumulates():
    def fn(p, x):  # x[2, 9, 8, 3]
        y = lax.conv_general_dilated(
            x, p["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )  # [2, 5, 4, 6]
        y = lax.scan(lambda c, _: (c @ p["dense"], None), y, length=3)[0]
        return jnp.einsum("bhwc,hcn->bhwn", y, p["rows"])

    params = {"conv": normal(3, 3, 3, 6), "dense": normal(6, 6), "rows": normal(5, 6, 7)}
    macs = {w.path: w.macs for w in trace(fn, params, normal(2, 9, 8, 3)).weights}
    positions = 2 * 5 * 4
    assert macs == {"conv": positions * 6 * 27, "dense": 3 * positions * 36, "rows": positions * 42}


def test_scales_do_nothing_but_multiply():
    """By products with activations alone: not what is added, read, or changed by another parameter before."""

    def fn(p, x):
        h = x * p["scale"] / p["divisor"] + p["bias"]
        return (h * p["both"] + p["both"]) * (p["changed"] * p["by"]) @ (p["rows"][:, None] * p["matrix"])

    params = {name: jnp.ones(6) for name in ("scale", "divisor", "bias", "both", "changed", "by", "rows", "unread")}
    traced = trace(fn, params | {"matrix": jnp.ones((6, 6))}, jnp.ones((2, 6)))
    assert traced.scales == {"scale", "divisor"}


def test_a_weight_used_twice_has_two_uses_of_different_inputs():
    _, traced = case_of("used_twice")
    shared, head, other = traced.weights
    assert [use.input for use in shared.uses] == ["x0", "x1"]
    assert (other.uses[0].input, head.uses[0].input) == ("x0", "x2")
    assert shared.macs == 2 * 6 * 36


def test_equal_inputs_are_recognized_through_layout_and_casts():
    def fn(p, x):
        flat = x.reshape(-1, 6).astype(jnp.bfloat16)
        y = flat @ p["a"].astype(jnp.bfloat16) + (p["b"].T @ x.transpose(2, 1, 0).reshape(6, -1)).T.astype(jnp.bfloat16)
        other_rows = jnp.einsum("btk,tn->bkn", x, p["c"])  # of the same array, but along its time axis
        return y, other_rows, (x * 2) @ p["d"]

    shapes = {"a": (6, 4), "b": (6, 4), "c": (3, 2), "d": (6, 4)}
    case = plain(fn, shapes, normal(2, 3, 6))
    groups = {w.path: w.group for w in trace(case.fn, case.params, case.x).weights}
    assert groups == {"a": "{a,b}", "b": "{a,b}", "c": "c", "d": "d"}


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        (["a.b"], "a.b"),
        (["l.0.q_proj.w", "l.0.kv_proj.w"], "l.0.{q,kv}_proj.w"),
        (["Dense_0.w", "Dense_1.w"], "Dense_{0,1}.w"),
        (["w1", "w3"], "{w1,w3}"),
        (["a_b", "a"], "{a_b,a}"),
        (["q.w", "k.w.low"], "{q.w,k.w.low}"),
        (["l.0.q", "l.1.k"], "{l.0.q,l.1.k}"),
    ],
)
def test_group_names(paths, name):
    assert group_name(paths) == name


def test_layouts_follow_the_elements():
    """Random chains of reshapes and transposes, against the positions that numpy moves."""
    rng = np.random.default_rng(0)
    followed = 0
    for _ in range(300):
        shape = tuple(rng.choice([1, 2, 3, 4, 6], size=rng.integers(1, 5)))
        index, axes = np.arange(np.prod(shape)).reshape(shape), layout.identity(shape)
        for _ in range(4):
            divisors = [d for d in range(1, index.size + 1) if index.size % d == 0]
            first = int(rng.choice(divisors))
            target = rng.permuted([first, index.size // first, 1])
            if rng.random() < 0.5:
                order = rng.permutation(index.ndim)
                index, axes = index.transpose(order), tuple(axes[i] for i in order)
            elif (split := layout.reshape(axes, target)) is not None:
                index, axes = index.reshape(target), split
        view, order = layout.canonical(shape, [factor for axis in axes for factor in axis])
        original = np.arange(index.size).reshape(view or shape).transpose(order)
        np.testing.assert_array_equal(original.reshape(index.shape), index)
        followed += not (index.ndim == len(shape) and (index == np.arange(index.size).reshape(index.shape)).all())
    assert followed > 200  # chains that moved something


def test_tracing_is_abstract_and_linear_in_the_layers(monkeypatch):
    """The 8B Llama 3 (32 blocks, 8 key-value heads) from shapes alone, each operation looked at once."""
    config = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192)
    apply, shapes = functional(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    seen = []
    equation = Walk._equation
    monkeypatch.setattr(Walk, "_equation", lambda self, eqn, *rest: (seen.append(eqn), equation(self, eqn, *rest))[1])
    traced = trace(apply, shapes, jax.ShapeDtypeStruct((1, 8192), jnp.int32))
    assert len(traced.weights) == 32 * 7 + 2  # with the embedding and the head, which are not tied
    size = sum(w.size for w in traced.weights)
    assert size == 8_030_261_248 - 65 * 4096  # the model's parameters without its norms
    assert sum(w.macs for w in traced.weights) == 8192 * (size - 128256 * 4096)  # a lookup multiplies nothing
    assert len(seen) < 32 * 250 + 50


def test_another_shape():
    case, traced = case_of("lora")
    other = traced.on((5, 6))
    assert traced.on([5, 6]) is other  # what is compiled for it serves again
    assert traced.on(case.x.shape) is traced
    assert [w.macs for w in other.weights] == [5 * 24, 5 * 12, 5 * 8]
    np.testing.assert_array_equal(jax.jit(other.evaluate)(case.params, case.x[0, :1].repeat(5, 0)).shape, (5, 4))

    moody = trace(lambda p, x: x @ p["w"] if x.shape[0] == 2 else x @ p["w"].T, {"w": normal(3, 3)}, normal(2, 3))
    with pytest.raises(MpqError, match=r"otherwise for float32\[4,3\] than for float32\[2,3\]"):
        moody.on((4, 3))
    pair = trace(lambda p, xs: xs[0] @ p["w"] + xs[1], {"w": normal(3, 3)}, (normal(2, 3), normal(2, 3)))
    with pytest.raises(MpqError, match="one input array"):
        pair.on((4, 3))


def test_inputs_may_be_a_tree_and_numpy():
    traced = trace(
        lambda p, xs: {"y": xs["a"] @ p["w"] + xs["b"]}, {"w": np.ones((3, 2))}, {"a": np.ones((4, 3)), "b": np.ones(2)}
    )
    output = traced.evaluate({"w": np.ones((3, 2))}, {"a": np.ones((4, 3)), "b": np.ones(2)}, identity)
    np.testing.assert_array_equal(output["y"], np.full((4, 2), 4.0))


def test_user_errors():
    traced = trace(
        lambda p, ids: p["table"][ids] @ p["w"],
        params := {"table": normal(11, 6), "w": normal(6, 4)},
        ids := tokens(2, 3),
    )
    evaluate = traced.evaluate
    with pytest.raises(MpqError, match=r"missing \['w'\], not expected \['v'\]"):
        evaluate({"table": params["table"], "v": params["w"]}, ids)
    with pytest.raises(MpqError, match=r"`w` was traced as float32\[6,4\], but is float32\[4,6\]"):
        evaluate(params | {"w": params["w"].T}, ids)
    with pytest.raises(MpqError, match=r"Traced for inputs int32\[2,3\], evaluated on int32\[1,3\]"):
        evaluate(params, ids[:1])
    with pytest.raises(
        MpqError, match=r"replacement for `table` returned float32\[2,3\]; the model expects float32\[2,3,6\]"
    ):
        evaluate(params, ids, lambda site, x, w, default: default(x, w)[..., 0])
    with pytest.raises(MpqError, match="`table` is looked up by integer indices"):
        traced.sites[0].inputs_matrix(ids)
    with pytest.raises(MpqError, match="`block` is a dict, not an array"):
        trace(lambda p, x: x, {"block": {"w": normal(2, 2)}}, normal(2, 2))
