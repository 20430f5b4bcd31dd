"""Flax modules of every kind, Linen and NNX, and what a trace must find in each; all go through `wrap`."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.trace_cases import Case, linen, normal, of_nnx, tokens, x6


class Layer(nn.Module):
    """One layer as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(6)(x)), None


class ScannedSecond(nn.Module):
    """Layers stacked along the second axis of every kernel."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=2)
        return stack(name="layers")(x, None)[0]


class NormalizedConv(nn.Module):
    """Batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (2, 2))(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


class TwoInputs(nn.Module):
    """Cross-attention of a decoder, with a mask, and a method of another name."""

    def setup(self):
        self.attention = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)

    def attend(self, x, memory, mask):
        return self.attention(x, memory, mask=mask)


class SoftExperts(nn.Module):
    """A router, and experts under `nn.vmap` that each see every token."""

    @nn.compact
    def __call__(self, x):
        gate = nn.softmax(nn.Dense(3, use_bias=False, name="router")(x))
        mapped = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
        return jnp.einsum("ebtn,bte->btn", mapped(4, use_bias=False, name="experts")(x), gate)


class Branching(nn.Module):
    """Lifted `cond` and `while_loop`."""

    @nn.compact
    def __call__(self, x):
        first, second = nn.Dense(6, name="first"), nn.Dense(6, name="second")
        if self.is_initializing():
            return first(second(x))
        x = nn.cond(x.sum() > 0, lambda m, x: first(x), lambda m, x: second(first(x)), self, x)
        return nn.while_loop(lambda m, c: c[0] < 2, lambda m, c: (c[0] + 1, jnp.tanh(second(c[1]))), self, (0, x))[1]


class LowRank(nn.Module):
    """A base layer and its LoRA, as in Hu et al. 2021."""

    @nn.compact
    def __call__(self, x):
        low = nn.Dense(2, use_bias=False, name="down")(x)
        return nn.Dense(4, name="base")(x) + 0.5 * nn.Dense(4, use_bias=False, name="up")(low)


class Weird(nn.Module):
    """Kernels that are computed before they are used."""

    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(6, use_bias=False, name="normed"))(x)
        x = nn.ConvTranspose(6, (2,), transpose_kernel=True, use_bias=False, name="flipped")(x)
        return nn.RNN(nn.OptimizedLSTMCell(5, name="cell"))(x)


class NnxScanned(nnx.Module):
    """The same scanned layers twice."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(6, 6, use_bias=False, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return jnp.tanh(nnx.remat(lambda m, x: m(x))(layer, x))

        return forward(self.layers, forward(self.layers, x))

    def as_experts(self, x):
        own_inputs = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0))
        return own_inputs(self.layers, jnp.stack([x, 1 - x])).sum(0)


class NnxBranching(nnx.Module):
    """`nnx.cond`, `nnx.fori_loop` and `nnx.while_loop` over modules, which pass their whole state through."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(6, 6, use_bias=False, rngs=rngs), nnx.Linear(6, 6, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = nnx.cond(x.sum() > 0, lambda m, x: m.a(x), lambda m, x: m.b(m.a(x)), self, x)
        x = nnx.fori_loop(0, 2, lambda i, c: (c[0], jnp.tanh(c[0].b(c[1]))), (self, x))[1]
        return nnx.while_loop(
            lambda c: abs(c[1]).max() > 0.1, lambda c: (c[0], 0.1 * jnp.tanh(c[0].a(c[1]))), (self, x)
        )[1]


class NnxNormalized(nnx.Module):
    """Batch statistics and dropout, made for training."""

    def __init__(self, rngs):
        self.convs = nnx.List(
            [
                nnx.Conv(3, 4, (3,), strides=2, rngs=rngs),
                nnx.Conv(4, 4, (2,), kernel_dilation=2, feature_group_count=4, padding="CIRCULAR", rngs=rngs),
            ]
        )
        self.up = nnx.ConvTranspose(4, 2, (2,), strides=(2,), rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.up(self.convs[1](self.dropout(self.norm(self.convs[0](x)))))


class NnxTied(nnx.Module):
    """An embedding whose table is the head, in bfloat16, and a block that is used twice."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=rngs)
        self.block = nnx.Linear(6, 6, param_dtype=jnp.float16, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(self.block(self.block(self.embed(ids)))).astype(jnp.float32)


def of(names: str, *rest: Any, prefix: str = "", suffix: str = ".kernel") -> list[tuple[Any, ...]]:
    """The same expectation of several weights."""
    return [(f"{prefix}{name}{suffix}", *rest) for name in names.split()]


def vectors(*names: str, **others: Any) -> dict[str, Any]:
    """Vectors, and other options of a case."""
    return {"skipped": dict.fromkeys(names, "vector"), **others}


MASK = jnp.tril(jnp.ones((3, 5), bool))[None, None]
GATES = "cell.{{{0}i,{0}f,{0}g,{0}o}}.kernel"

FLAX_CASES: dict[str, Callable[[], Case]] = {
    "linen_conv3d": lambda: linen(
        nn.Conv(4, (2, 3, 2), feature_group_count=2, use_bias=False),
        normal(1, 4, 3, 3, 2),
        ("kernel", 2, 12, 2, "conv", ""),
    ),
    "linen_conv_local": lambda: linen(
        nn.ConvLocal(4, (2,), padding="VALID", use_bias=False), x6, ("kernel", 2, 12, 4, "matmul", "")
    ),
    "linen_scan_second_axis": lambda: linen(
        ScannedSecond(),
        x6,
        *((f"layers.Dense_0.kernel[:,{i}]", 1, 6, 6, "matmul", "") for i in range(2)),
        skipped={"layers.Dense_0.bias": "vector in every slice"},
        gradient="rounded",
    ),
    "linen_batch_norm": lambda: linen(
        NormalizedConv(),
        normal(2, 4, 4, 3),
        ("Conv_0.kernel", 1, 12, 4, "conv", ""),
        ("Dense_0.kernel", 1, 4, 3, "matmul", ""),
        **vectors(
            *(f"batch_stats/BatchNorm_0.{name}" for name in ("mean", "var")),
            *(f"BatchNorm_0.{name}" for name in ("scale", "bias")),
            *("Conv_0.bias", "Dense_0.bias"),
            call={"train": False},
        ),
    ),
    "linen_two_inputs": lambda: linen(
        TwoInputs(),
        (x6, normal(2, 5, 6), MASK),
        ("attention.query.kernel", 1, 6, 6, "matmul", ""),
        *of("key value", 1, 6, 6, "matmul", "attention.{key,value}.kernel", prefix="attention."),
        ("attention.out.kernel", 1, 6, 6, "matmul", ""),
        call={"method": "attend"},
    ),
    "linen_soft_experts": lambda: linen(
        SoftExperts(),
        x6,
        ("router.kernel", 1, 6, 3, "matmul", "{router,experts}.kernel"),
        ("experts.kernel", 1, 6, 12, "matmul", "{router,experts}.kernel"),
    ),
    "linen_branching": lambda: linen(
        Branching(),
        x6,
        *of("first second", 1, 6, 6, "matmul", ""),
        **vectors("first.bias", "second.bias", gradient="forward"),
    ),
    "linen_lora": lambda: linen(
        LowRank(),
        x6,
        ("down.kernel", 1, 6, 2, "matmul", "{down,base}.kernel"),
        ("base.kernel", 1, 6, 4, "matmul", "{down,base}.kernel"),
        ("up.kernel", 1, 2, 4, "matmul", ""),
        **vectors("base.bias"),
    ),
    "linen_lstm": lambda: linen(
        nn.RNN(nn.LSTMCell(5)),
        x6,
        *(
            (f"cell.{kind}{gate}.kernel", 1, k, 5, "matmul", GATES.format(kind))
            for gate in "ifgo"
            for kind, k in (("i", 6), ("h", 5))
        ),
        **vectors(*(f"cell.h{gate}.bias" for gate in "ifgo")),
    ),
    "linen_computed_kernels": lambda: linen(
        Weird(),
        x6,
        skipped={
            "normed.kernel": "read by `mul`, not by a matmul",
            "flipped.kernel": "read by `rev`, not by a matmul",
            "WeightNorm_0.normed/kernel/scale": "vector",
            **{f"cell.{a}{b}.kernel": "read by `concatenate`, not by a matmul" for a in "ih" for b in "ifgo"},
            **{f"cell.h{b}.bias": "vector" for b in "ifgo"},
        },
    ),
    "linen_float16": lambda: linen(
        nn.Sequential(
            [
                nn.Dense(5, param_dtype=jnp.float16, dtype=jnp.float16),
                nn.Dense(4, param_dtype=jnp.bfloat16, dtype=jnp.float16),
            ]
        ),
        x6.astype(jnp.float16),
        ("layers_0.kernel", 1, 6, 5, "matmul", ""),
        ("layers_1.kernel", 1, 5, 4, "matmul", ""),
        **vectors("layers_0.bias", "layers_1.bias"),
    ),
    "nnx_scan_twice": lambda: of_nnx(
        NnxScanned, x6, *((f"layers.kernel[{i}]", 1, 6, 6, "matmul", "") for i in range(2)), gradient="rounded"
    ),
    "nnx_experts": lambda: of_nnx(
        NnxScanned, x6, ("layers.kernel", 2, 6, 6, "matmul", ""), call={"method": "as_experts"}
    ),
    "nnx_branching": lambda: of_nnx(NnxBranching, x6, *of("a b", 1, 6, 6, "matmul", ""), gradient="forward"),
    "nnx_normalized": lambda: of_nnx(
        NnxNormalized,
        normal(2, 8, 3),
        ("convs.0.kernel", 1, 9, 4, "conv", ""),
        ("convs.1.kernel", 4, 2, 1, "conv", ""),
        ("up.kernel", 1, 8, 2, "conv", ""),
        **vectors(
            *("convs.0.bias", "convs.1.bias", "up.bias"),
            *(f"norm.{name}" for name in ("scale", "bias", "mean", "var")),
        ),
    ),
    "nnx_tied": lambda: of_nnx(
        NnxTied,
        tokens(2, 4),
        ("embed.embedding", 1, 6, 11, "embedding+matmul", ""),
        ("block.kernel", 1, 6, 6, "matmul", ""),
        **vectors("block.bias"),
    ),
    "nnx_lora": lambda: of_nnx(
        lambda rngs: nnx.LoRALinear(6, 4, lora_rank=2, rngs=rngs),
        x6,
        ("kernel", 1, 6, 4, "matmul", "{kernel,lora.lora_a}"),
        ("lora.lora_a", 1, 6, 2, "matmul", "{kernel,lora.lora_a}"),
        ("lora.lora_b", 1, 2, 4, "matmul", ""),
        **vectors("bias"),
    ),
}
"""Name -> maker of a case."""
