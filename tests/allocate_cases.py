"""Knapsack problems and slow, independent solutions of them."""

import itertools

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from mpq.allocate import Problem
from mpq.formats import parse_scheme
from mpq.types import SensitivityTable, Use, WeightSpec

TEXTS = ("int2_g64", "int2_g32", "int3_g64", "int3_g32", "int4_g64", "int4_g32", "int8_channel", "bf16")
SCHEMES = tuple(parse_scheme(text) for text in TEXTS)


def weight(path, k=64, n=64, group=None, batch=1):
    shape = (k, n) if batch == 1 else (batch, k, n)
    use = Use("matmul", f"input of {group or path}", batch * k * n)
    return WeightSpec(path, path, (), shape, tuple(range(len(shape))), batch, k, n, group or path, (use,))


def make_problem(size_bits, loss, *, allowed=None, variance=None, names=None, **fields):
    """A problem with one weight a group; sizes need not be those of the schemes."""
    size_bits, loss = np.array(size_bits, np.int64), np.array(loss, np.float64)
    names = names or tuple(f"w{row:04}" for row in range(len(size_bits)))
    return Problem(
        names=names,
        members=tuple((weight(name),) for name in names),
        schemes=SCHEMES[: size_bits.shape[1]],
        loss=loss,
        variance=np.zeros_like(loss) if variance is None else np.array(variance, np.float64),
        size_bits=size_bits,
        allowed=np.ones(loss.shape, np.bool_) if allowed is None else np.array(allowed, np.bool_),
        **fields,
    )


def graded_problem(groups: int, schemes: int = 4, seed: int = 0) -> Problem:
    """Random groups whose losses fall to a quarter with every scheme; standard errors of a tenth."""
    loss = np.exp(np.random.default_rng(seed).normal(size=(groups, 1))) * 0.25 ** np.arange(schemes) / groups
    size = np.array([2, 3, 4, 8][:schemes]) * 1000 * np.ones((groups, 1), np.int64)
    return make_problem(size, loss, variance=np.square(0.1 * loss))


def table(weights, loss, stderr=None, schemes=SCHEMES[:3]):
    loss = np.array(loss, np.float64)
    stderr = np.zeros_like(loss) if stderr is None else np.array(stderr, np.float64)
    return SensitivityTable(tuple(weights), tuple(schemes), loss, stderr, "kl", "rtn", "model", "data")


KINDS = ("free", "monotone", "identical", "proportional", "scaled", "flat")


def random_problem(kind, rng, *, groups=None, schemes=None, some_forbidden=True):
    """A random small instance. Losses are integers times a power of two, so every sum of them is exact in float64."""
    shape = (groups or int(rng.integers(1, 7)), schemes or int(rng.integers(1, 5)))
    top = int(rng.choice([3, 10, 1000, 10**6, 10**9]))
    high = int(rng.choice([2, 5, 1000, 2**30]))
    size, loss = rng.integers(0, top, shape), rng.integers(-high, high + 1, shape)
    if kind == "monotone":  # as in practice: more bits, less loss
        size, loss = np.sort(size, axis=1), -np.sort(-loss, axis=1)
    elif kind == "identical":  # many ties
        size[:], loss[:] = size[0], loss[0]
    elif kind == "proportional":  # a hull that is one straight line
        size, loss = size % 1000, -7 * (size % 1000)
    elif kind == "scaled":  # sizes of very different groups
        size = size * rng.integers(1, 1000, (shape[0], 1))
    elif kind == "flat":  # nothing to gain
        loss[:] = 1
    allowed = np.ones(shape, np.bool_)
    if some_forbidden:
        allowed = rng.random(shape) < 0.85
        allowed[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = True
    names = tuple(f"w{index:04}" for index in rng.permutation(shape[0]))
    return make_problem(size, loss * 2.0 ** int(rng.integers(-40, 20)), allowed=allowed, names=names)


def all_choices(problem):
    """Every allowed choice with its size and loss, by enumeration."""
    options = [np.flatnonzero(row) for row in problem.allowed]
    choices = np.array(list(itertools.product(*options)))
    rows = np.arange(len(problem.names))
    return choices, problem.size_bits[rows, choices].sum(axis=1), problem.loss[rows, choices].sum(axis=1)


def brute_force(problem):
    """The frontier by enumeration: list of (size, loss, choice), ties by the rule that `Frontier` documents."""
    choices, size, loss = all_choices(problem)
    order = comparison_order(problem)
    points = []
    for index in sorted(range(len(choices)), key=lambda i: (size[i], loss[i], *choices[i][order])):
        if not points or loss[index] < points[-1][1]:
            points.append((int(size[index]), float(loss[index]), choices[index].tolist()))
    return points


def comparison_order(problem):
    """Groups in the order in which tied choices are compared: widest range of useful sizes first, then by name."""

    def span(row):
        options = np.flatnonzero(problem.allowed[row])
        size, loss = problem.size_bits[row, options], problem.loss[row, options]
        return int(size[loss == loss.min()].min() - size.min())

    return sorted(range(len(problem.names)), key=lambda row: (-span(row), problem.names[row]))


def dense_frontier(problem):
    """The frontier by plain dynamic programming over every integer size; integer losses, non-negative sizes."""
    unreachable = np.iinfo(np.int64).max // 4
    best = np.zeros(1, np.int64)
    for sizes, losses in zip(problem.size_bits, problem.loss.astype(np.int64), strict=True):
        longer = np.full(len(best) + sizes.max(), unreachable)
        for size, loss in zip(sizes, losses, strict=True):
            longer[size : size + len(best)] = np.minimum(longer[size : size + len(best)], best + loss)
        best = longer
    before = np.concatenate([[unreachable // 2], np.minimum.accumulate(best)[:-1]])
    size = np.flatnonzero(best < np.minimum(before, unreachable // 2))
    return size, best[size]


def solve_milp(problem, budget_bits):
    """Size and loss of the optimum by HiGHS: its absolute gap is 1e-6, so integer losses below 1e9 are exact."""
    groups, schemes = problem.loss.shape
    one_each = np.kron(np.eye(groups), np.ones(schemes))
    result = milp(
        problem.loss.ravel(),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(problem.size_bits.ravel()[None].astype(np.float64), -np.inf, budget_bits),
        ],
        integrality=np.ones(problem.loss.size),
        bounds=Bounds(0, problem.allowed.ravel().astype(np.float64)),
        options={"mip_rel_gap": 0.0},
    )
    assert result.success, result.message
    choice = result.x.reshape(groups, schemes).argmax(axis=1)
    rows = np.arange(groups)
    size_bits = int(problem.size_bits[rows, choice].sum())
    assert size_bits <= budget_bits  # not merely within the solver's tolerance
    return size_bits, problem.loss[rows, choice].sum()


def transformer(num_groups, seed=0, *, dim=256, kv=64, ffn=768, vocab=4096, schemes=SCHEMES, outlier=1.0):
    """A transformer's fused groups with their true sizes; losses fall like 4^-bits, lognormal over groups."""
    rng = np.random.default_rng(seed)
    shapes = {
        "qkv": [(dim, dim), (dim, kv), (dim, kv)],
        "out": [(dim, dim)],
        "gate_up": [(dim, ffn)] * 2,
        "down": [(ffn, dim)],
    }
    members = [
        tuple(weight(f"{layer}.{name}.{i}", k, n, f"{layer}.{name}") for i, (k, n) in enumerate(parts))
        for layer in range((num_groups + 2) // 4)
        for name, parts in shapes.items()
    ][: num_groups - 1]
    members.append((weight("embedding", dim, vocab),))
    bits = np.array([scheme.size_bits(dim, dim) / dim**2 for scheme in schemes])
    share = np.array([sum(spec.size for spec in group) for group in members], np.float64)
    spread = rng.lognormal(0, outlier, (num_groups, 1)) * rng.lognormal(0, 0.1, (num_groups, len(bits)))
    loss = share[:, None] / share.sum() * 16 * 4.0**-bits * spread
    return Problem(
        names=tuple(group[0].group for group in members),
        members=tuple(members),
        schemes=tuple(schemes),
        loss=loss,
        variance=(0.1 * loss) ** 2,
        size_bits=np.array(
            [[sum(spec.size_bits(s) for spec in group) for s in schemes] for group in members], np.int64
        ),
        allowed=np.ones(loss.shape, np.bool_),
    )
