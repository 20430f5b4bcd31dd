"""Small modules and functions, and the weights that a trace must find in each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax

from mpq.models.llama import Llama, LlamaConfig
from mpq.models.wrap import wrap


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """`fn(params, x)`; `weights`: (path, batch, k, n, kind, group), group "" for its own; `skipped`: path -> reason.

    `gradient` is `exact`, `rounded` where unrolling a scan changes the order of a sum, or `forward` where JAX has no
    other. `split`: what is divided into experts, None if nothing is.
    """

    fn: Callable[[dict[str, jax.Array], jax.Array], jax.Array]
    params: dict[str, jax.Array]
    x: jax.Array
    weights: list[tuple[str, int, int, int, str, str]]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    gradient: str = "exact"
    split: list[str] | None = None


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Standard normal float32."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def tokens(*shape: int, vocab: int = 11) -> jax.Array:
    """Random ids."""
    return jnp.asarray(np.random.default_rng(0).integers(vocab, size=shape), jnp.int32)


def redrawn(params: dict[str, Any]) -> dict[str, jax.Array]:
    """Random values for every parameter, so that none is zero; variances are positive."""
    values = {name: 0.3 * normal(*p.shape, seed=i) for i, (name, p) in enumerate(sorted(params.items()))}
    positive = lambda name, value: abs(value) + 0.1 if name.endswith("var") else value
    return {name: positive(name, value).astype(params[name].dtype) for name, value in values.items()}


def linen(module: nn.Module, x: Any, *weights: Any, call: Any = None, **options: Any) -> Case:
    """A Linen module as a case; `call`: keyword arguments of the call."""
    args, call = (x if isinstance(x, tuple) else (x,)), call or {}
    wrapped = wrap(module, jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **call)), **call)
    return Case(wrapped.apply, redrawn(wrapped.params), x, list(weights), **options)


def of_nnx(
    make: Callable[[nnx.Rngs], nnx.Module], x: jax.Array, *weights: Any, call: Any = None, **options: Any
) -> Case:
    """An NNX module as a case; `call`: keyword arguments of the call."""
    wrapped = wrap(nnx.eval_shape(lambda: make(nnx.Rngs(0))), **(call or {}))
    return Case(wrapped.apply, redrawn(wrapped.params), x, list(weights), **options)


def plain(fn: Any, shapes: dict[str, tuple[int, ...]], x: jax.Array, *weights: Any, **options: Any) -> Case:
    """A function as a case."""
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return Case(fn, redrawn(structs), x, list(weights), **options)


def exact(fn: Any, shapes: dict[str, tuple[int, ...]], x: jax.Array, *weights: Any, **options: Any) -> Case:
    """A function as a case in small even integers: float32 sums of halves of their products are exact in any order."""
    case = plain(fn, shapes, jnp.round(2 * x), *weights, **options)
    return dataclasses.replace(case, params={name: 2 * jnp.round(4 * p) for name, p in case.params.items()})


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        h = nn.silu(nn.Dense(10)(h)) * nn.Dense(10)(h)
        return nn.Dense(6)(h) + x


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.MultiHeadDotProductAttention(num_heads=2)(x, x), None


class Scanned(nn.Module):
    """Embedding, blocks under `nn.scan` over `nn.remat`, tied head."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 8)
        stack = nn.scan(nn.remat(Attention), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return embed.attend(stack(name="blocks")(embed(ids), None)[0])


class Experts(nn.Module):
    """Two dense layers, vmapped over experts that see different inputs."""

    @nn.compact
    def __call__(self, x):
        mapped = nn.vmap(Mlp, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)
        return mapped(name="experts")(jnp.stack([x, x + 1, x * 2]))


class Convs(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, padding="SAME")(x))
        x = nn.relu(nn.Conv(12, (3, 2), feature_group_count=4, padding="VALID")(x))
        x = nn.relu(nn.Conv(12, (2, 2), feature_group_count=12, kernel_dilation=2)(x))
        return nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x)


class NnxMix(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.general = nnx.LinearGeneral(6, (3, 4), rngs=rngs)
        self.einsum = nnx.Einsum("bthd,hdo->bto", (3, 4, 5), (5,), rngs=rngs)
        self.conv = nnx.Conv(5, 6, kernel_size=3, rngs=rngs)
        self.head = nnx.Linear(6, 11, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.conv(self.einsum(self.general(self.embed(ids)))))


@jax.custom_vjp
def doubled_gradient(x, w):
    return x @ w


doubled_gradient.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, 2 * saved[0].T @ g))


@jax.custom_jvp
def custom_tangent(x, w):
    return jnp.sin(x) @ w


custom_tangent.defjvp(lambda primals, tangents: (custom_tangent(*primals), 3 * (tangents[0] @ primals[1])))


def layouts(p, x):
    """Weights that arrive transposed, split, merged, cast, as the left operand, or as a static row of a stack."""
    y = (x @ p["transposed"].T.astype(jnp.float32)).reshape(*x.shape[:-1], 2, 4)  # [b, t, 2, 4]
    y = jnp.einsum("btij,ijo->obt", y, p["merged"].reshape(2, 4, 5))  # [5, b, t]
    y = jnp.einsum("oij,obt->tbij", p["left"].transpose(2, 0, 1), y)  # [t, b, 3, 4]
    y = jnp.einsum("tbij,jik->btk", y, p["swapped"])  # [b, t, 6]
    y = jnp.tanh(y @ p["stack"][1]) @ p["stack"][0][None].squeeze(0)
    return y @ jnp.broadcast_to(p["unit"], (1, 6, 1))[0]


def grouped_linear(p, x):
    """A block-diagonal matmul, written as a batched one, and blocks whose outputs share an axis with the groups."""
    y = jnp.einsum("btgk,gkn->btgn", x.reshape(*x.shape[:-1], 2, 3), p["rows"].reshape(2, 3, 4))
    return jnp.einsum("btgk,kgn->btgn", y, p["columns"].reshape(4, 2, 5))


def rnn(p, x):
    step = lambda h, row: (jnp.tanh(row @ p["input"] + h @ p["hidden"] + p["bias"]), h)
    h, states = lax.scan(step, jnp.zeros((x.shape[0], 5)), x.swapaxes(0, 1), reverse=True)
    return h + states.sum(0)


def scan_mixed(p, x):
    """Scanned and constant weights, a scanned vector, scanned outputs, in reverse; then a scan over vectors alone."""

    def step(c, row):
        w, scale = row
        return jnp.tanh(c @ w * scale) @ p["shared"], c.sum()

    y, sums = lax.scan(step, x, (p["layers"], p["scales"]), reverse=True)
    z, _ = lax.scan(lambda c, v: (jnp.tanh(c @ p["shared"]) * v, None), y, p["scales"])
    return y + z + sums[0] + 2 * sums[1]


def refused(p, x):
    """One parameter for each reason not to be a weight."""
    y = x @ p["used"]
    y = y + x @ (p["summed"] + p["low"] @ p["rank"])
    y = y + x @ p["mixed"].reshape(6, 4)[:, :1] + x @ p["part"][:, :6]
    y = y + (x @ p["conflict"]) @ p["conflict"].T + x @ p["conflict"].T
    y = y + x @ p["both"][0] + jnp.einsum("btk,lkn->btln", x, p["both"]).sum(2)
    y = y + p["bias2"].reshape(6) + (p["vector"] * y) + (y @ p["vector"])[..., None] * p["scalar"]
    y = y + lax.scan(lambda c, _: ((c[0] @ c[1], 2 * c[1]), None), (y, p["carried"]), length=2)[0][0]
    y = y + lax.scan(lambda c, w: (c * w, None), y, p["scales"])[0]
    y = y + x @ jnp.concatenate([p["joined"], p["joined"]], axis=1)[:, 3:9]
    return y + x @ p["slices"][0] + lax.dynamic_index_in_dim(p["dynamic"], 1, keepdims=False).sum()


def used_twice(p, x):
    """A shared block, a tied soft lookup, and two weights joined into one group by a third."""
    h = jnp.tanh(x @ p["shared"]) @ p["shared"]
    return h @ p["head"] + x @ p["other"]


def lora(p, x):
    return x @ p["w"] + (x @ p["down"]) @ p["up"] * 0.5


def bfloat16(p, x):
    low = lambda a: a.astype(jnp.bfloat16)
    return (low(x) @ low(p["q"]) * (low(x) @ low(p["k"]))).astype(jnp.float32) + x @ p["v"]


REFUSED = {
    "bias2": "broadcast over activations: a bias or a scale, not a matrix",
    "both": "read both as a whole and in slices",
    "carried": "carried and changed by a loop",
    "conflict": "read twice, with different axes contracted",
    "dynamic": "read in parts (`dynamic_slice`)",
    "joined": "read by `concatenate`, not by a matmul",
    "low": "multiplied by another parameter, not by an activation",
    "mixed": "its axes are mixed by a reshape from (4, 6) to (6, 4)",
    "part": "read in parts (`slice`)",
    "rank": "multiplied by another parameter, not by an activation",
    "scalar": "scalar",
    "scales": "vector in every slice",
    "slices": "in part: the slices [1], [2] reach no matmul",
    "summed": "read by `add`, not by a matmul",
    "unused": "never read",
    "vector": "vector",
}

REFUSED_SHAPES = {
    "used": (6, 6), "summed": (6, 6), "low": (6, 2), "rank": (2, 6), "mixed": (4, 6),
    "part": (6, 7), "conflict": (6, 6), "both": (2, 6, 6), "bias2": (2, 3), "vector": (6,), "scalar": (),
    "carried": (6, 6), "scales": (2, 6), "slices": (3, 6, 6),
    "dynamic": (3, 6, 6), "joined": (6, 6), "unused": (4, 4),
}  # fmt: skip

x6 = normal(2, 3, 6)
heads = "blocks.MultiHeadDotProductAttention_0"
blocks = [
    weight
    for i in range(2)
    for weight in (
        *(
            (f"{heads}.{name}.kernel[{i}]", 1, 8, 8, "matmul", f"{heads}.{{query,key,value}}.kernel[{i}]")
            for name in ("query", "key", "value")
        ),
        (f"{heads}.out.kernel[{i}]", 1, 8, 8, "matmul", ""),
    )
]


def llama(tie: bool, num_blocks: int) -> Case:
    """A Llama: seven weights a block, the embedding, and the head if it is not tied."""
    config = LlamaConfig(11, 8, 12, num_blocks, 2, 1, 4, 16, tie_word_embeddings=tie)
    weights = [("embed_tokens.embedding", 1, 8, 11, "embedding+matmul" if tie else "embedding", "")]
    for i in range(num_blocks):
        qkv, both = f"layers.{i}.self_attn.{{q,k,v}}_proj.kernel", f"layers.{i}.mlp.{{gate,up}}_proj.kernel"
        weights += [
            (f"layers.{i}.self_attn.{name}_proj.kernel", 1, 8, n, "matmul", qkv)
            for name, n in zip("qkv", (8, 4, 4), strict=True)
        ]
        weights += [(f"layers.{i}.self_attn.o_proj.kernel", 1, 8, 8, "matmul", "")]
        weights += [(f"layers.{i}.mlp.{name}_proj.kernel", 1, 8, 12, "matmul", both) for name in ("gate", "up")]
        weights += [(f"layers.{i}.mlp.down_proj.kernel", 1, 12, 8, "matmul", "")]
    weights += [] if tie else [("lm_head.kernel", 1, 8, 11, "matmul", "")]
    norms = [f"layers.{i}.{name}_layernorm.scale" for i in range(num_blocks) for name in ("input", "post_attention")]
    skipped = dict.fromkeys([*norms, "norm.scale"], "vector")
    return of_nnx(lambda rngs: Llama(config, rngs=rngs), tokens(2, 4), *weights, skipped=skipped)


def biases(*names: str, **reasons: str) -> dict[str, str]:
    """Vectors, and parameters with reasons of their own."""
    return {"skipped": dict.fromkeys(names, "vector") | {k.replace("_bias", ".bias"): v for k, v in reasons.items()}}


BROADCAST = "broadcast over activations: a bias or a scale, not a matrix"
SCALE = "broadcast over activations by a product: a scale, not a matrix"

CASES: dict[str, Callable[[], Case]] = {
    "linen_mlp": lambda: linen(
        Mlp(),
        x6,
        ("Dense_0.kernel", 1, 6, 10, "matmul", "Dense_{0,1}.kernel"),
        ("Dense_1.kernel", 1, 6, 10, "matmul", "Dense_{0,1}.kernel"),
        ("Dense_2.kernel", 1, 10, 6, "matmul", ""),
        **biases("Dense_0.bias", "Dense_1.bias", "Dense_2.bias", "LayerNorm_0.scale", "LayerNorm_0.bias"),
    ),
    "linen_general": lambda: linen(
        nn.Sequential(
            [nn.DenseGeneral((3, 4)), nn.DenseGeneral((2, 5), axis=(-1, -2)), nn.Einsum((5, 2, 7), "...ij,jik->...k")]
        ),
        x6,
        ("layers_0.kernel", 1, 6, 12, "matmul", ""),
        ("layers_1.kernel", 1, 12, 10, "matmul", ""),
        ("layers_2.kernel", 1, 10, 7, "matmul", ""),
        **biases("layers_2.bias", layers_0_bias=BROADCAST, layers_1_bias=BROADCAST),
    ),
    "linen_conv1d": lambda: linen(
        nn.Conv(4, (3,), padding="CAUSAL"), x6, ("kernel", 1, 18, 4, "conv", ""), **biases("bias")
    ),
    "linen_convs": lambda: linen(
        Convs(),
        normal(2, 9, 8, 3),
        ("Conv_0.kernel", 1, 27, 8, "conv", ""),
        ("Conv_1.kernel", 4, 12, 3, "conv", ""),
        ("Conv_2.kernel", 12, 4, 1, "conv", ""),
        ("ConvTranspose_0.kernel", 1, 48, 4, "conv", ""),
        **biases("Conv_0.bias", "Conv_1.bias", "Conv_2.bias", "ConvTranspose_0.bias"),
    ),
    "linen_scan_remat_tied": lambda: linen(
        Scanned(),
        tokens(2, 5),
        ("Embed_0.embedding", 1, 8, 11, "embedding+matmul", ""),
        *blocks,
        skipped={f"{heads}.{name}.bias": BROADCAST for name in ("query", "key", "value")}
        | {f"{heads}.out.bias": "vector in every slice"},
    ),
    "linen_experts": lambda: linen(
        Experts(),
        x6,
        ("experts.Dense_0.kernel", 3, 6, 10, "matmul", "experts.Dense_{0,1}.kernel"),
        ("experts.Dense_1.kernel", 3, 6, 10, "matmul", "experts.Dense_{0,1}.kernel"),
        ("experts.Dense_2.kernel", 3, 10, 6, "matmul", ""),
        skipped={f"experts.{name}": BROADCAST for name in ("Dense_0.bias", "Dense_1.bias", "Dense_2.bias")}
        | {"experts.LayerNorm_0.scale": SCALE, "experts.LayerNorm_0.bias": BROADCAST},
    ),
    "nnx_mix": lambda: of_nnx(
        NnxMix,
        tokens(2, 4),
        ("embed.embedding", 1, 6, 11, "embedding", ""),
        ("general.kernel", 1, 6, 12, "matmul", ""),
        ("einsum.kernel", 1, 12, 5, "matmul", ""),
        ("conv.kernel", 1, 15, 6, "conv", ""),
        ("head.kernel", 1, 6, 11, "matmul", ""),
        skipped={**dict.fromkeys(["einsum.bias", "conv.bias", "head.bias"], "vector"), "general.bias": BROADCAST},
    ),
    "nnx_attention": lambda: of_nnx(
        lambda rngs: nnx.MultiHeadAttention(num_heads=2, in_features=6, rngs=rngs, decode=False),
        x6,
        *((f"{name}.kernel", 1, 6, 6, "matmul", "{query,key,value}.kernel") for name in ("query", "key", "value")),
        ("out.kernel", 1, 6, 6, "matmul", ""),
        skipped={
            "out.bias": "vector",
            **dict.fromkeys([f"{name}.bias" for name in ("query", "key", "value")], BROADCAST),
        },
    ),
    "llama_tied": lambda: llama(True, 1),
    "llama_untied": lambda: llama(False, 2),
    "layouts": lambda: plain(
        layouts,
        {
            "transposed": (8, 6),
            "merged": (8, 5),
            "left": (3, 4, 5),
            "swapped": (4, 3, 6),
            "stack": (2, 6, 6),
            "unit": (6, 1),
        },
        x6,
        ("transposed", 1, 6, 8, "matmul", ""),
        ("merged", 1, 8, 5, "matmul", ""),
        ("left", 1, 5, 12, "matmul", ""),
        ("swapped", 1, 12, 6, "matmul", ""),
        ("stack[1]", 1, 6, 6, "matmul", ""),
        ("stack[0]", 1, 6, 6, "matmul", ""),
        ("unit", 1, 6, 1, "matmul", ""),
    ),
    "grouped_linear": lambda: plain(
        grouped_linear,
        {"rows": (6, 4), "columns": (4, 10)},
        x6,
        ("rows", 2, 3, 4, "matmul", ""),
        ("columns", 2, 4, 5, "matmul", ""),
    ),
    "rnn": lambda: plain(
        rnn,
        {"input": (6, 5), "hidden": (5, 5), "bias": (5,)},
        x6,
        ("input", 1, 6, 5, "matmul", ""),
        ("hidden", 1, 5, 5, "matmul", ""),
        **biases("bias"),
    ),
    "scan_mixed": lambda: plain(
        scan_mixed,
        {"layers": (3, 6, 6), "scales": (3, 6), "shared": (6, 6)},
        x6,
        ("layers[2]", 1, 6, 6, "matmul", ""),
        ("shared", 1, 6, 6, "matmul", ""),
        ("layers[1]", 1, 6, 6, "matmul", ""),
        ("layers[0]", 1, 6, 6, "matmul", ""),
        skipped={"scales": "vector in every slice"},
        gradient="rounded",
    ),
    "custom_vjp": lambda: plain(
        lambda p, x: jnp.tanh(doubled_gradient(x.reshape(-1, 6), p["a"])) @ p["b"],
        {"a": (6, 4), "b": (4, 3)},
        x6,
        ("a", 1, 6, 4, "matmul", ""),
        ("b", 1, 4, 3, "matmul", ""),
    ),
    "custom_jvp": lambda: plain(
        lambda p, x: custom_tangent(x, p["w"]), {"w": (6, 4)}, x6, ("w", 1, 6, 4, "matmul", "")
    ),
    "used_twice": lambda: plain(
        used_twice,
        {"shared": (6, 6), "head": (6, 4), "other": (6, 4)},
        x6,
        ("shared", 1, 6, 6, "matmul", "{shared,other}"),
        ("head", 1, 6, 4, "matmul", ""),
        ("other", 1, 6, 4, "matmul", "{shared,other}"),
    ),
    "lora": lambda: plain(
        lora,
        {"w": (6, 4), "down": (6, 2), "up": (2, 4)},
        x6,
        ("w", 1, 6, 4, "matmul", "{w,down}"),
        ("down", 1, 6, 2, "matmul", "{w,down}"),
        ("up", 1, 2, 4, "matmul", ""),
    ),
    "bfloat16": lambda: plain(
        bfloat16,
        {"q": (6, 4), "k": (6, 4), "v": (6, 4)},
        x6,
        *((name, 1, 6, 4, "matmul", "{q,k,v}") for name in "qkv"),
    ),
    "padded_vocabulary": lambda: plain(
        lambda p, ids: p["table"][ids] @ p["table"][:9].T,
        {"table": (11, 6)},
        tokens(2, 4),
        ("table", 1, 6, 11, "embedding", ""),
        skipped={"table": "in part: also read in parts (`slice`)"},
    ),
    "soft_lookup": lambda: plain(
        lambda p, ids: p["table"][ids] + jax.nn.one_hot(ids, 11) @ p["table"],
        {"table": (11, 6)},
        tokens(2, 4),
        ("table", 1, 11, 6, "embedding+matmul", ""),
    ),
    "refused": lambda: plain(
        refused,
        REFUSED_SHAPES,
        x6,
        ("used", 1, 6, 6, "matmul", "{used,slices[0]}"),
        ("slices[0]", 1, 6, 6, "matmul", "{used,slices[0]}"),
        skipped=REFUSED,
    ),
}
"""Name -> maker of a case."""
