"""Functions with branches, loops and experts, what a trace must find in each, and reasons to skip a parameter."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tests.trace_cases import Case, exact, normal, plain, tokens, x6

MATRIX = {"a": (6, 6), "b": (6, 6)}


def both_branches(p, x):
    """Weights of one branch, of both, of outside; a branch without weights; a branch in a scan in `checkpoint`."""
    x = x @ p["outside"]
    x = lax.cond(x.sum() > 0, lambda: jnp.tanh(x @ p["a"]) @ p["b"], lambda: x @ p["b"] + x @ p["outside"])
    branches = [lambda y: y, lambda y: jnp.sin(y @ p["a"]), lambda y: y @ p["c"].T]
    step = lambda y, i: (lax.switch(i, branches, y), None)
    return jax.checkpoint(lambda y: lax.scan(step, y, jnp.arange(3))[0])(x)


def while_loop(p, x):
    """A constant of the body, in a branch too; a loop that may not run at all."""
    body = lambda c: (c[0] + 1, jnp.tanh(lax.cond(c[0] > 0, lambda: c[1] @ p["a"], lambda: c[1] @ p["b"])))
    y = lax.while_loop(lambda c: c[0] < 2, body, (0, x))[1]
    return lax.fori_loop(0, jnp.where(x[0, 0, 0] > 0, 2, 1), lambda i, y: jnp.tanh(y @ p["c"]), y)


def unchanged_in_loops(p, x):
    """Parameters that a loop carries and hands back as they were: constants in all but form."""
    y, p = lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]["a"]), c[1]), None), (x, p), length=2)[0]
    y, p = lax.fori_loop(0, 2, lambda i, c: (jnp.tanh(c[0] @ c[1]["a"]), c[1]), (y, p))
    y, p = lax.while_loop(lambda c: abs(c[0]).max() > 0.1, lambda c: (0.1 * jnp.tanh(c[0] @ c[1]["a"]), c[1]), (y, p))
    y, p = lax.cond(y.sum() > 0, lambda: (y @ p["b"], p), lambda: (y, p))
    return y @ p["b"]


def handed_out(p, x):
    """Slices that leave a scan as they entered it are the parameter again, whether they are read inside or not."""
    again = jax.checkpoint(lambda w: w)  # else JAX itself sees that they are handed through
    y, layers = lax.scan(lambda c, w: (jnp.tanh(c @ w), again(w)), x, p["layers"])
    z, (scales, _) = lax.scan(lambda c, s: (c * s[0][0], again(s)), x, (p["scales"], y.sum((0, 1))[:3]), reverse=True)
    return y @ layers[0] @ scales[1].T + z


def other_axes(p, x):
    """Slices along other axes than the first: of a scan, of two scans, by a static index; and a scan of length one."""
    y = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["second"].swapaxes(0, 1))[0]
    inner = lambda c, w: (jnp.tanh(c @ w), None)
    y = lax.scan(lambda c, w: (lax.scan(inner, c, jnp.moveaxis(w, 2, 0))[0], None), y, p["outer"])[0]
    y = y @ p["last"][..., 1] + lax.scan(lambda c, w: (c @ w, None), y, p["one"][None])[0]
    return lax.scan(inner, y, p["single"])[0]


def dense_experts(p, x):
    """Every expert sees every token."""
    chosen = jax.nn.one_hot(jnp.argmax(x @ p["router"], -1), 3)
    hidden = jax.nn.relu(jnp.einsum("btd,edf->betf", x, p["up"]) * jnp.einsum("efd,btd->betf", p["gate"], x))
    return jnp.einsum("betd,bte->btd", jnp.einsum("betf,efd->betd", hidden, p["down"]), chosen)


def dispatched_experts(p, x):
    """Every expert sees its own tokens; those of others are zero."""
    chosen = jax.nn.one_hot(jnp.argmax(x @ p["router"], -1), 3)
    own = jnp.einsum("btd,bte->ebtd", x, chosen)
    hidden = jax.nn.relu(jnp.einsum("ebtd,edf->ebtf", own, p["up"]) * jnp.einsum("efd,ebtd->ebtf", p["gate"], own))
    return jnp.einsum("ebtd,bte->btd", jnp.einsum("ebtf,efd->ebtd", hidden, p["down"]), chosen)


def layers_of_experts(p, x):
    """Experts within scanned layers: `[layer, expert, k, n]`."""
    step = lambda c, w: (jax.vmap(jnp.matmul)(c, w), None)
    return lax.scan(step, jnp.stack([x, -x]), p["layers"])[0]


def convolve(x, w, **options):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), **options)


def vmapped_convolution(p, x):
    return jax.vmap(convolve)(jnp.stack([x, 2 * x, x * x]), p["w"])


def refused_loops(p, x):
    """One parameter for every reason that branches, loops and operations of their own kind give."""
    y = x @ lax.cond(x.sum() > 0, lambda: p["chosen_a"], lambda: p["chosen_b"])
    y = y + lax.platform_dependent(x, p["platform"], cpu=lambda x, w: x @ w, default=lambda x, w: x @ w)
    y = lax.while_loop(lambda c: (c[0] @ p["condition"]).sum() > 9, lambda c: (c[0] / 2, c[1]), (y, 0))[0]
    y, w = lax.while_loop(lambda c: c[0].sum() > 9, lambda c: (c[0] @ c[1], 2 * c[1]), (y, p["carried"]))
    y = y @ w + y @ lax.scan(lambda c, _: (c, p["passed"]), 0, length=2)[1][0]
    y = y @ lax.fori_loop(0, jnp.int32(x.shape[0]), lambda i, w: p["returned"], jnp.zeros((6, 6)))
    y = sum(lax.scan(lambda c, w: (c @ w, p["row"]), y, p["rows"]))
    y = y @ lax.scan(lambda c, w: (c, w.T), 0, p["stacked"])[1][0]
    y = lax.scan(lambda c, w: (c @ w.reshape(6, 6), None), y, p["part"].reshape(2, 3, 2, 6))[0]
    y = y @ p["two_ways"][0] + y @ p["two_ways"][:, 0]
    y = lax.fori_loop(0, 2, lambda i, c: c @ p["indexed"][i], y)
    y = y + jax.vmap(lambda table: table[tokens(2, 3, vocab=3)])(p["tables"]).sum(0)
    y = y + convolve(p["input"], y[:, :, :1].swapaxes(0, 1)[:, :1]).sum()
    y = y + convolve(jnp.concatenate([y, y]), p["batch_groups"], batch_group_count=2).sum((0, 2), keepdims=True)
    return y + p["whole"].sum() + lax.scan(lambda c, w: (c @ w, c), y, p["empty"])[0]


REFUSED_LOOPS = {
    "batch_groups": "the kernel of a convolution with batch groups",
    "carried": "carried and changed by a loop",
    "chosen_a": "chosen by the branches of a `cond`",
    "chosen_b": "chosen by the branches of a `cond`",
    "condition": "read in the condition of a `while` loop",
    "empty": "empty",
    "indexed": "read in parts (`dynamic_slice`)",
    "input": "the input of a convolution, not its kernel",
    "part": "scanned along a part of an axis",
    "passed": "passed on by a loop",
    "platform": "read inside `cond`, where a read cannot be replaced",
    "returned": "passed on by a loop",
    "row": "passed on by a loop",
    "stacked": "passed on by a loop",
    "tables": "read in parts (`gather`)",
    "two_ways": "read in slices of two kinds",
    "whole": "read by `reduce_sum`, not by a matmul",
}

REFUSED_LOOP_SHAPES = dict.fromkeys(REFUSED_LOOPS, (6, 6)) | {
    "rows": (2, 6, 6), "row": (3, 6), "part": (6, 2, 6), "stacked": (2, 6, 6), "two_ways": (6, 6, 6),
    "indexed": (2, 6, 6), "tables": (2, 3, 6), "input": (3, 5, 1), "batch_groups": (3, 6, 2), "empty": (0, 6, 6),
}  # fmt: skip
EXPERTS = {"router": (6, 3), "up": (3, 6, 4), "gate": (3, 4, 6), "down": (3, 4, 6)}


def experts(names: str) -> list[tuple[str, int, int, int, str, str]]:
    """What is expected of experts, one by one: `up` and `gate` of each are a group."""
    group = "{{up[{0}],gate[{0}]}}"
    each = {"up": (1, 6, 4, "matmul", group), "gate": (1, 6, 4, "matmul", group), "down": (1, 4, 6, "matmul", "")}
    return [(f"{n}[{e}]", *each[n][:-1], each[n][-1].format(e)) for n in names.split() for e in range(3)]


FLOW_CASES: dict[str, Callable[[], Case]] = {
    "cond": lambda: plain(
        both_branches,
        {"outside": (6, 6), "a": (6, 6), "b": (6, 6), "c": (6, 6)},
        x6,
        ("outside", 1, 6, 6, "matmul", "{outside,b}"),
        ("b", 1, 6, 6, "matmul", "{outside,b}"),
        ("a", 1, 6, 6, "matmul", ""),
        ("c", 1, 6, 6, "matmul", ""),
    ),
    "while": lambda: plain(
        while_loop,
        MATRIX | {"c": (6, 6)},
        x6,
        *((name, 1, 6, 6, "matmul", "") for name in "bac"),
        gradient="forward",
    ),
    "unchanged_in_loops": lambda: plain(
        unchanged_in_loops, MATRIX, x6, *((name, 1, 6, 6, "matmul", "") for name in "ab"), gradient="forward"
    ),
    "handed_out": lambda: plain(
        handed_out,
        {"layers": (2, 6, 6), "scales": (3, 6, 6)},
        x6,
        *((f"layers[{i}]", 1, 6, 6, "matmul", "") for i in range(2)),
        ("scales[1]", 1, 6, 6, "matmul", ""),
        skipped={"scales": "in part: the slices [0], [2] reach no matmul"},
    ),
    "other_axes": lambda: plain(
        other_axes,
        {"second": (6, 2, 6), "outer": (2, 6, 6, 2), "last": (6, 6, 2), "one": (6, 6), "single": (1, 6, 6)},
        x6,
        *((f"second[:,{i}]", 1, 6, 6, "matmul", "") for i in range(2)),
        *((f"outer[{i},:,:,{j}]", 1, 6, 6, "matmul", "") for i in range(2) for j in range(2)),
        ("last[:,:,1]", 1, 6, 6, "matmul", "{last[:,:,1],one}"),
        ("one", 1, 6, 6, "matmul", "{last[:,:,1],one}"),
        ("single[0]", 1, 6, 6, "matmul", ""),
        skipped={"last": "in part: the slices [:,:,0] reach no matmul"},
    ),
    "dense_experts": lambda: exact(
        dense_experts,
        EXPERTS,
        x6,
        ("router", 1, 6, 3, "matmul", "{router,up,gate}"),
        ("up", 1, 6, 12, "matmul", "{router,up,gate}"),
        ("gate", 1, 6, 12, "matmul", "{router,up,gate}"),
        ("down", 3, 4, 6, "matmul", ""),
    ),
    "dense_experts_split": lambda: exact(
        dense_experts,
        EXPERTS,
        x6,
        ("router", 1, 6, 3, "matmul", ""),
        *experts("up gate down"),
        split=["up", "gate", "down"],
    ),
    "dispatched_experts_split": lambda: exact(
        dispatched_experts,
        EXPERTS,
        x6,
        ("router", 1, 6, 3, "matmul", ""),
        *experts("up gate down"),
        split=[*EXPERTS][1:],
    ),
    "dispatched_experts": lambda: exact(
        dispatched_experts,
        EXPERTS,
        x6,
        ("router", 1, 6, 3, "matmul", ""),
        ("up", 3, 6, 4, "matmul", "{up,gate}"),
        ("gate", 3, 6, 4, "matmul", "{up,gate}"),
        ("down", 3, 4, 6, "matmul", ""),
    ),
    "layers_of_experts_split": lambda: exact(
        layers_of_experts,
        {"layers": (2, 2, 6, 6)},
        x6,
        *((f"layers[{i},{e}]", 1, 6, 6, "matmul", "") for i in range(2) for e in range(2)),
        split=["layers[0]", "layers[1]"],
    ),
    "vmapped_convolution": lambda: plain(vmapped_convolution, {"w": (3, 2, 6, 4)}, x6, ("w", 3, 12, 4, "conv", "")),
    "refused_loops": lambda: plain(
        refused_loops,
        REFUSED_LOOP_SHAPES,
        x6,
        ("rows[0]", 1, 6, 6, "matmul", ""),
        ("rows[1]", 1, 6, 6, "matmul", ""),
        skipped=REFUSED_LOOPS,
        gradient="forward",
    ),
    "stacked_convolution_mixes": lambda: plain(
        lambda p, x: convolve(
            x, p["w"].reshape(1, 3, 2, 3).transpose(0, 1, 3, 2).reshape(1, 3, 6), feature_group_count=2
        ),
        {"w": (1, 3, 6)},
        x6,
        skipped={"w": "its output channels mix with other axes"},
    ),
    "ragged": lambda: plain(
        lambda p, x: lax.ragged_dot(x.reshape(-1, 6), p["w"], jnp.array([2, 4])),
        {"w": (2, 6, 4)},
        x6,
        skipped={"w": "read by `ragged_dot_general`, a matmul that cannot be replaced"},
    ),
    "integers": lambda: Case(
        lambda p, x: x @ p["w"] + p["codes"].sum().astype(jnp.float32),
        {"w": normal(6, 4), "codes": jnp.ones((2, 2), jnp.int8)},
        x6,
        [("w", 1, 6, 4, "matmul", "")],
        {"codes": "not floating point (int8)"},
        gradient="none",
    ),
}
"""Name -> maker of a case."""
