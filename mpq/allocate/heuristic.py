"""The baseline that needs no measurement: llama.cpp's fixed mixes, carried over to any schemes and any traced model.

`llama_tensor_get_type` (llama.cpp, src/llama-quant.cpp) gives the K-quants `_M` one type for most weights and the next
larger one to the head (the embedding, where the two are tied), and to attention's value projection and the feed-forward
down projection in some layers, `use_more_bits`:

    i < n/8  or  i >= 7n/8  or  (i - n/8) mod 3 = 2          [whole numbers; layer i of the n that have such a weight]

Differences from llama.cpp: the next larger scheme is that of the candidates, whatever they are; a projection that holds
query, key and value in one counts as the value, as do all weights fused with it, for they share the scheme. A model in
which neither projection is found by name (a convolutional network) gets the common rule that the first and the last
weight get more (DoReFa, Zhou et al. 2016, arXiv:1606.06160).

Fails on: projections called otherwise than `_VALUE` and `_DOWN` say, which are then taken for ordinary weights.
"""

import re
from collections.abc import Sequence

import numpy as np

from mpq.allocate.lagrangian import lower_bound
from mpq.allocate.problem import Problem
from mpq.types import Allocation, WeightSpec

# What modules are called in the families here, in Flax's attention, and in checkpoints in the Hugging Face layout.
_VALUE = re.compile(r"(.*\.)?(v_proj|value|qkv_proj|qkv|query_key_value|c_attn|wv)")
_DOWN = re.compile(r"(.*\.)?(down_proj|fc2|w2|dense_4h_to_h|mlp\.(c_proj|wo|Dense_1)|(?<!attention\.)output(\.dense)?)")
_LAYER = re.compile(r"(.*?(?:^|[._])\d+)\.")  # up to the first number: `layers.3`, `encoder.block_3`
_INDEX = re.compile(r"\[(\d+)")

NAME = "heuristic"


def preferred(weights: Sequence[WeightSpec]) -> list[str]:
    """Paths of the weights that get more bits.

    Args:
      weights: in the order in which the model reads them.
    """
    inside: set[str] = set()
    found: list[str] = []
    for role in (_VALUE, _DOWN):
        layer_of = {w.path: layer for w in weights if role.fullmatch(_module(w)) and (layer := _layer(w))}
        layers = list(dict.fromkeys(layer_of.values()))
        inside.update(layers)
        more = {layer for i, layer in enumerate(layers) if _use_more_bits(i, len(layers))}
        found += [path for path, layer in layer_of.items() if layer in more]
    if not inside:
        return list(dict.fromkeys((weights[0].path, weights[-1].path)))
    last = max(row for row, w in enumerate(weights) if _layer(w) in inside)
    tied = [w.path for w in weights if w.kind.startswith("embedding+")]
    return [*found, *(w.path for w in weights[last + 1 :]), *tied]


def heuristic(problem: Problem, budget_bits: int) -> Allocation | None:
    """The fixed mix of the largest base scheme that fits; None if none does.

    A group that may not take its scheme takes the largest allowed one below it, or else the smallest it may take.
    The solver's name says the base: `heuristic-int4_g64`.

    Raises:
      MpqError: the budget is out of range (`Problem.check_budget`).
    """
    budget_bits = problem.check_budget(budget_bits)
    total = np.array([sum(w.size_bits(s) for group in problem.members for w in group) for s in problem.schemes])
    order = np.argsort(total, kind="stable")
    rank = np.searchsorted(total[order], total)  # equal for schemes of equal size
    specs = {spec.path: spec for group in problem.members for spec in group}
    more = set(preferred([specs[path] for path in problem.paths or specs]))
    upgraded = np.array([any(spec.path in more for spec in group) for group in problem.members])
    rows = np.arange(len(problem.names))
    for base in order[::-1]:
        larger = order[rank[order] > rank[base]]
        if not len(larger):
            continue  # there is nothing more to give: that is the uniform plan
        choice = _nearest_allowed(problem.allowed, rank, np.where(upgraded, larger[0], base))
        if problem.size_bits[rows, choice].sum() <= budget_bits:
            bound = lower_bound(problem, budget_bits)
            name = f"{NAME}-{problem.schemes[base]}"
            return problem.allocation(choice, budget_bits=budget_bits, lower_bound=bound, solver=name)
    return None


def _nearest_allowed(allowed: np.ndarray, rank: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`int64[G]`: the scheme wanted, or the largest allowed one below it, or else the smallest allowed one."""
    below = np.where(allowed & (rank <= rank[wanted][:, None]), rank, -1)
    smallest = np.where(allowed, rank, len(rank)).argmin(axis=1)
    nearest = np.where(below.max(axis=1) >= 0, below.argmax(axis=1), smallest)
    return np.where(allowed[np.arange(len(wanted)), wanted], wanted, nearest)


def _use_more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _module(weight: WeightSpec) -> str:
    """The path without brackets and without the parameter's own name."""
    stem = weight.path.partition("[")[0]
    return re.sub(r"\.(kernel|weight|w|embedding)$", "", stem)


def _layer(weight: WeightSpec) -> str | None:
    """What tells the layer: the path up to its first number, or the index of a slice; None outside of layers."""
    stem, _, _ = weight.path.partition("[")
    if match := _LAYER.match(stem):
        return match[1]
    index = _INDEX.search(weight.path)
    return index[1] if index else None
