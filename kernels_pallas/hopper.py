"""NVIDIA Hopper, in Pallas for Mosaic GPU: few tokens times weights of 8, 4 or 2 bits, activations in bfloat16 or int8.

The tensor cores take a first operand of 64 rows from registers and a second one of 8 columns or more from shared
memory. So the weight's columns are the rows, and the tokens the columns: `y^T = w^T x^T`, and few tokens waste little.
A block is one warpgroup that copies, as many tiles ahead as shared memory holds, and some that multiply 64 columns of
the weight each:

    wait for a step of tiles -> codes to registers (`registers`, exact) -> products of up to 128 rows -> times the
    group's scale in float32 -> added to a sum in float32

Scales meet partial sums, so dequantized weights are never rounded; sums of int8 are int32 within a group. A step may
take two tiles of rows, so that one is decoded while the tensor cores have the other.

Few tokens are bound by the bytes of the codes (Frantar et al. 2024, arXiv:2408.11743), so every processor must read all
the time. There is one block a processor, and all take equal parts of the work (`shares`), that of all experts of a
batch of weights together. With more tokens it is the activations that every block reads again: blocks of a cluster
read them once.

The interpreter runs it on a CPU, which needs a thread of the client for every warpgroup: tests give it those, and
`interpret` of `quantized_matmul` does not reach it. Measured on an H200: `experiments/results/kernels`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kernels_pallas import compat, fragments, hopper_round, interpreted, registers
from kernels_pallas.backend import Backend, Config, Problem, dot_type, of_zeros
from kernels_pallas.devices import DEVICES, Device
from kernels_pallas.fragments import LANES, ROWS
from kernels_pallas.hopper_kernel import Form, barriers, kernel, operand_rows, scales_of, tiles_in_shared_memory
from kernels_pallas.packed import Packed, width
from kernels_pallas.reference import quantize_tokens
from kernels_pallas.shares import Shares, added

MAX_TOKENS = 4096

MAX_DECODED, MOST_ALONE = 32, 128
"""Tokens with which activations are few bytes beside codes, and with which clusters gain nothing."""

PROCESSORS = 132
"""Of an H100 and an H200 (SXM), for which kernels are compiled where there is none."""

_SHARED = DEVICES["NVIDIA H200"].fast_memory - 1024  # barriers take some


def _run(x: jax.Array, packed: Packed, activation_bits: int | None, config: Config, interpret: bool) -> jax.Array:
    """As the contract says, of one expert or of several."""
    if not packed.batch_shape:
        first = jax.tree.map(lambda array: array[None], packed)
        return _run(x[None], first, activation_bits, config, interpret)[0]
    m, over = x.shape[1], registers.over(packed.bits)
    if activation_bits is None:
        y = _products(_whole_tiles(x, packed, config), None, packed, config, interpret)[:, :m, : packed.n]
        return y if packed.zeros is None else y - jax.vmap(of_zeros)(x, packed)
    tokens, rows = -(-m // config[2]) * config[2], packed.spec.tiled_k
    if packed.zeros is None and not interpret and hopper_round.fits(x.shape, x.dtype, packed.bits):
        codes, factor = hopper_round.rounded(x, packed.bits, tokens, rows, over)
        return _products(codes, factor, packed, config, interpret)[:, :m, : packed.n]
    codes, scale = (x, jnp.ones((*x.shape[:2], 1), jnp.float32)) if x.dtype == jnp.int8 else quantize_tokens(x)
    factor = jnp.pad(scale[..., 0] / over, ((0, 0), (0, tokens - m)))
    permuted = fragments.permute_rows(_whole_tiles(codes, packed, config), packed.bits)
    y = _products(permuted, factor, packed, config, interpret)[:, :m, : packed.n]
    return y if packed.zeros is None else y - jax.vmap(of_zeros)(codes, packed) * scale


def _whole_tiles(x: jax.Array, packed: Packed, config: Config) -> jax.Array:
    """Zeros behind tokens and rows."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % config[2]), (0, packed.spec.tiled_k - packed.k)))


def _products(x: jax.Array, factor: jax.Array | None, packed: Packed, config: Config, interpret: bool) -> jax.Array:
    """`float32[e, m, n]` of `x[e, m, k]` in whole tiles, times `factor[e, m]`."""
    warpgroups, depth, tokens, stages, cluster = config
    gpu, spec, (experts, m, _) = compat.mosaic_gpu(), packed.spec, x.shape
    columns, rows = ROWS * warpgroups * cluster, operand_rows(packed.group_size, x.dtype == jnp.int8)
    steps, strips = spec.tiled_k // LANES // depth, experts * (spec.tiled_n // columns) * (m // tokens)
    shares = Shares(steps, strips, min(compat.processors(PROCESSORS) // cluster, steps * strips))
    on, table = interpreted if interpret else registers, packed.levels is not None
    scaled = factor is not None and shares.inside
    handing = shares.blocks * cluster if shares.inside else 1
    form = Form(shares, packed.group_size, packed.bits, on, table, scaled, cluster)
    call = gpu.kernel(
        functools.partial(kernel, form),
        out_type=(
            jax.ShapeDtypeStruct((shares.parts, experts, m, spec.tiled_n), jnp.float32),
            jax.ShapeDtypeStruct((handing, warpgroups, ROWS, tokens), jnp.float32),
        ),
        grid=(shares.blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            *tiles_in_shared_memory(form, config, packed.codes.shape[-2], x.dtype),
            *barriers(stages, warpgroups, cluster),
            *registers.table_places(packed.levels),
            *(interpreted.scratch(warpgroups, tokens, rows, x.dtype) if interpret else ()),
        ],
        compiler_params=compat.gpu_params(),
        interpret=compat.gpu_interpreter() if interpret else False,
        kernel_name=f"mpq_{'t' if table else 'w'}{packed.bits}a{width(x.dtype)}",
        **({} if cluster == 1 else {"cluster": (cluster,), "cluster_names": ("cluster",)}),
    )
    factors = (factor,) if scaled else ()
    parts = call(packed.codes, packed.scales, x, *factors, *registers.table_values(packed.levels))[0]
    total = added(parts, shares, columns, tokens)
    return total if factor is None or scaled else total * factor[..., None]


def tiles(problem: Problem) -> Config:
    """`(warpgroups, depth, tokens, stages, blocks of a cluster)` from sizes alone: the first of `candidates`."""
    return candidates(problem)[0]


def candidates(problem: Problem) -> tuple[Config, ...]:
    """Three that fit, the likeliest first: as many multiply as registers let, and copies fill the shared memory.

    A power of two as the number of stages makes the place of a step in their ring a mask. Half a register of a thread
    is a token's sum, one for each of at most two scales under way, and with groups one more; operands of int8 leave
    more of them. With more tokens than decoding has, the best two are there in clusters of two blocks as well.
    """
    found = []
    for tokens in dict.fromkeys(_whole(problem.m, size) for size in (64, 128, 256)):
        for warpgroups, depth in ((4, 2), (2, 2), (4, 1), (2, 1)):
            fit = _room(problem) // _stage_bytes(problem, warpgroups, depth, tokens)
            config = (warpgroups, depth, tokens, 1 << min(3, int(math.log2(max(fit, 1)))), 1)
            sums = tokens * (1 if problem.group_size is None else 1 + min(2, scales_of(problem.group_size, depth)))
            most = 768 if warpgroups == 2 and dot_type(problem) == "int8" else 512
            if legal(problem, config) and config[3] >= 2 and sums * warpgroups <= most:
                found.append(config)
    # More sums and operands than four warpgroups have registers for; or few copies ahead.
    worst = lambda config: (config[0] == 4 and config[2] > 32, config[3] < 4, -config[2])
    best = sorted(found, key=worst)[:3]
    twins = [twin for config in best[:2] if legal(problem, twin := (*config[:4], 2))] if problem.m > MAX_DECODED else []
    return (*twins, *best) if problem.m > MOST_ALONE else (*best, *twins)


def _whole(tokens: int, most: int) -> int:
    """By eights."""
    return min(most, -(-tokens // 8) * 8)


def _rows(problem: Problem) -> int:
    """Tiles of rows."""
    whole = problem.k if problem.group_size is None else problem.groups * problem.group_size
    return -(-whole // LANES)


def _room(problem: Problem) -> int:
    """Bytes of shared memory for stages."""
    return _SHARED - (4 * math.prod(registers.PAIRS) if problem.table else 0)


def _stage_bytes(problem: Problem, warpgroups: int, depth: int, tokens: int) -> int:
    x_bytes = 1 if dot_type(problem) == "int8" else 2
    weight = warpgroups * ROWS * (depth * LANES * problem.bits // 8 + 4 * scales_of(problem.group_size, depth))
    return weight + tokens * depth * LANES * x_bytes + 16


def legal(problem: Problem, config: Config) -> bool:
    """Whether tiles divide among warpgroups and steps, groups agree with steps, and shared memory holds the stages."""
    if len(config) != 5 or min(config) < 1:
        return False
    warpgroups, depth, tokens, stages, cluster = config
    columns, group = -(-problem.n // LANES) * LANES // ROWS, problem.group_size
    whole = columns % (warpgroups * cluster) == 0 and _rows(problem) % depth == 0
    whole = whole and tokens % (8 * cluster) == 0 and tokens <= 256  # each block of a cluster fetches whole eights
    agree = group is None or group <= LANES or group // LANES % depth == 0
    return whole and agree and stages * _stage_bytes(problem, warpgroups, depth, tokens) <= _room(problem)


def _refuses(problem: Problem) -> str | None:
    if not compat.hopper():
        return f"it runs on NVIDIA's Hopper, not on {compat.device_kind('cuda')}"
    if problem.activation_bits is None and problem.x_dtype != "bfloat16":
        return f"its activations are {problem.x_dtype}, allowed are bfloat16 and those that are rounded to int8"
    if not 1 <= problem.m <= MAX_TOKENS:
        return f"it has {problem.m} tokens, allowed are 1 to {MAX_TOKENS}"
    return registers.too_long(problem.group_size or problem.k) if problem.activation_bits else None


def _seconds(problem: Problem, device: Device) -> float:
    """The roofline, with tensor cores half busy, and what it takes to start, to fill the ring and to add the sums."""
    busy = 2 * problem.macs / device.macs[dot_type(problem)]
    return 5e-6 + max(device.seconds(problem.num_bytes, 0, dot_type(problem)), busy)


HOPPER = Backend(
    platforms=("cuda",),
    layouts=("hopper",),
    interpretable=False,
    run=_run,
    refuses=_refuses,
    seconds=_seconds,
    tiles=tiles,
    legal=legal,
    candidates=candidates,
    complete=True,
    experts=True,
)
