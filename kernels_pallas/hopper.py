"""NVIDIA Hopper, in Pallas for Mosaic GPU: few tokens times weights of 8, 4 or 2 bits, activations in bfloat16 or int8.

The tensor cores take a first operand of 64 rows from registers and a second one of 8 columns or more from shared
memory. So the weight's columns are the rows, and the tokens the columns: `y^T = w^T x^T`, and few tokens waste little.
A block is one warpgroup that copies, as many tiles ahead as shared memory holds, and some that multiply 64 columns of
the weight each:

    wait for a step of tiles -> codes to registers (`registers`, exact) -> products of 128 rows -> times the group's
    scale in float32 -> added to a sum in float32

Scales meet partial sums, so dequantized weights are never rounded; sums of int8 are int32 within a group. A step may
take two tiles of rows, so that one is decoded while the tensor cores have the other.

Few tokens are bound by the bytes of the codes (Frantar et al. 2024, arXiv:2408.11743), so every processor must read all
the time. There is one block a processor. Steps are numbered through all rows of a strip of columns and then those of
the next, and each block takes an equal range of the numbers (`Shares`; the idea is Stream-K's, Osama et al. 2023,
arXiv:2301.03598). A strip that several blocks have parts of has as many sums, and a second pass adds them in their
order: no atomics, and the same bits every time.

The interpreter runs it on a CPU, which needs a thread of the client for every warpgroup: tests give it those, and
`interpret` of `quantized_matmul` does not reach it. Measured on an H200: `experiments/results/kernels`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat, fragments, interpreted, registers
from kernels_pallas.backend import Backend, Config, Problem, dot_type
from kernels_pallas.devices import DEVICES, Device
from kernels_pallas.fragments import LANES, ROWS
from kernels_pallas.packed import Packed, width

MAX_TOKENS = 4096

PROCESSORS = 132
"""Of an H100 and an H200 (SXM)."""

_COPYING = 40
"""Registers of a thread that copies."""

_SHARED = DEVICES["NVIDIA H200"].fast_memory - 1024  # barriers take some


@dataclasses.dataclass(frozen=True)
class Shares:
    """How blocks share the steps of a matmul. Arguments may be traced; of integers the answers are integers.

    Attributes:
      steps: of one strip.
      strips: of columns for a batch of tokens. Batches of the same columns follow each other: codes are in a cache.
      blocks: at most as many as there are steps.
    """

    steps: int
    strips: int
    blocks: int

    def begin(self, block: Any) -> Any:
        """The first step of a block, of all strips; of `blocks`: their number."""
        return _quotient(block * (self.steps * self.strips), self.blocks)

    def owner(self, step: Any) -> Any:
        """The block that has a step."""
        return _quotient((step + 1) * self.blocks - 1, self.steps * self.strips)

    def part(self, block: Any, strip: Any) -> Any:
        """Which of a strip's sums a block writes."""
        return block - self.owner(strip * self.steps)

    @property
    def parts(self) -> int:
        """The most sums that a strip has."""
        return max(self.part(self.last(strip), strip) for strip in range(self.strips)) + 1

    def last(self, strip: Any) -> Any:
        """The last block that has a part of a strip."""
        return self.owner((strip + 1) * self.steps - 1)


def _quotient(a: Any, b: int) -> Any:
    """Of what is not negative: `//` of traced values would ask for a sign."""
    return a // b if isinstance(a, int) else lax.div(a, b)


def _kernel(shares: Shares, per_scale: int | None, bits: int, on: Any, table: bool, *refs: Any) -> None:
    """One block: `w[k / 128, n / 64, words, 128]`, `s[groups, n]`, `x[m, k]` in global memory to `y[parts, m, n]`.

    Tiles of the three are in shared memory, with barriers that say which are full and which are free.

    Args:
      shares: which steps are whose.
      per_scale: tiles of rows that share a scale; None: all.
      bits: of a code.
      on: `registers`, or its twin for the interpreter.
      table: whether a table of values, `registers.pairs`, is the fourth operand.
      refs: as above, the tiles, the barriers, the table's place and barrier, and what the twin needs.
    """
    (w, s, x), values, (y, w_tile, s_tile, x_tile, full, free, *more) = refs[:3], refs[3 : 3 + table], refs[3 + table :]
    places, scratch = more[: 2 * table], more[2 * table :]
    gpu = compat.mosaic_gpu()
    thread, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    (stages, depth, warpgroups), scales, tokens = w_tile.shape[:3], s_tile.shape[1], x_tile.shape[1]
    batches, steps = y.shape[1] // tokens, shares.steps
    begin, end = shares.begin(block), shares.begin(block + 1)
    parts = 1 if x.dtype == jnp.int8 else 2
    ring = lambda step: lax.rem(step - begin, stages)

    def place(strip: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First tile of columns and first token of a strip."""
        return lax.div(strip, batches) * warpgroups, lax.rem(strip, batches) * tokens

    @pl.when(thread == warpgroups)
    def _copy() -> None:
        gpu.set_max_registers(_COPYING, action="decrease")

        def _wait(step: jax.Array) -> None:
            """Until the place of a step is free."""

            @pl.when(step - begin >= stages)
            def _() -> None:
                gpu.barrier_wait(free.at[ring(step)])

        def ahead(step: jax.Array, carry: jax.Array) -> jax.Array:
            slot, strip = ring(step), lax.div(step, steps)

            _wait(step)
            row, (first, token) = lax.rem(step, steps) * depth, place(strip)
            group = 0 if per_scale is None else lax.div(row, per_scale)
            strip_columns = pl.ds(first * ROWS, warpgroups * ROWS)
            part = x.at[pl.ds(token, tokens), pl.ds(row * LANES, depth * LANES)]
            gpu.copy_gmem_to_smem(w.at[pl.ds(row, depth), pl.ds(first, warpgroups)], w_tile.at[slot], full.at[slot])
            gpu.copy_gmem_to_smem(s.at[pl.ds(group, scales), strip_columns], s_tile.at[slot], full.at[slot])
            gpu.copy_gmem_to_smem(part, x_tile.at[slot], full.at[slot])
            return carry

        def behind(step: jax.Array, carry: jax.Array) -> jax.Array:
            _wait(step)
            return carry

        if table:
            gpu.copy_gmem_to_smem(*values, *places)
        lax.fori_loop(begin, end, ahead, jnp.int32(0))
        lax.fori_loop(end, end + stages, behind, jnp.int32(0))

    @pl.when(thread < warpgroups)
    def _multiply() -> None:
        gpu.set_max_registers(most_registers(warpgroups), action="increase")
        kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
        sums = gpu.ACC((ROWS, tokens), kind)

        def products(slot: jax.Array, *into: Any) -> list[jax.Array]:
            """Adds the products of a step to one accumulator for every scale; the scales.

            At most two parts of tiles are in registers: one that the tensor cores have, and one that is decoded.
            """
            gpu.barrier_wait(full.at[slot])
            for tile in range(depth):
                held = on.held(w_tile.at[slot, tile, thread])
                for part in range(parts):
                    if tile * parts + part > 1:
                        on.finish_all_but(1)
                    operand = on.operand(held, part, parts, bits, places[0] if table else None, x.dtype)
                    rows = pl.ds((tile * parts + part) * (LANES // parts), LANES // parts)
                    on.multiply(into[tile % scales], operand, x_tile.at[slot, :, rows], thread, scratch)
            strip_rows = pl.ds(thread * ROWS, ROWS)
            found = [on.column_scales(s_tile.at[slot, i, strip_rows]) for i in range(scales)]
            on.finish_all_but(0)
            gpu.barrier_arrive(free.at[slot])
            return found

        def scaled(into: Any, scale: jax.Array) -> jax.Array:
            part = into[...].astype(jnp.float32)
            return part * lax.broadcast_in_dim(scale, part.shape, [0])

        def by_groups(first: jax.Array, last: jax.Array) -> jax.Array:
            def one(step: jax.Array, total: jax.Array) -> jax.Array:
                def add(*into: Any) -> jax.Array:
                    found = products(ring(step), *into)
                    return functools.reduce(jnp.add, map(scaled, into, found), total)

                return pl.run_scoped(add, *[sums] * scales)

            return lax.fori_loop(first, last, one, on.zeros(ROWS, tokens))

        def at_once(first: jax.Array, last: jax.Array) -> jax.Array:
            def all_rows(into: Any) -> jax.Array:
                one = lambda step, scale: products(ring(step), into)[0]
                return scaled(into, lax.fori_loop(first, last, one, on.zeros(ROWS)))

            return pl.run_scoped(all_rows, sums)

        def strip_(strip: jax.Array, carry: jax.Array) -> jax.Array:
            first, token = place(strip)
            bounds = lax.max(begin, strip * steps), lax.min(end, (strip + 1) * steps)
            total = (at_once if per_scale is None else by_groups)(*bounds)
            strip_rows = pl.ds((first + thread) * ROWS, ROWS)
            on.store(y.at[shares.part(block, strip), pl.ds(token, tokens), strip_rows], total)
            return carry

        if table:
            gpu.barrier_wait(places[1])
        lax.fori_loop(lax.div(begin, steps), lax.div(end - 1, steps) + 1, strip_, jnp.int32(0))


def most_registers(warpgroups: int) -> int:
    """Of a thread that multiplies, by eights.

    Threads start with equal shares of the 65,536 of a processor, at most 248. Those that multiply wait for more until
    those that copy have given theirs away, forever if there are too few.
    """
    share = min(248, 65536 // (128 * (warpgroups + 1)) // 8 * 8)
    return min(232, (share * (warpgroups + 1) - _COPYING) // warpgroups // 8 * 8)


def _run(x: jax.Array, packed: Packed, config: Config, interpret: bool) -> jax.Array:
    warpgroups, depth, tokens, stages = config
    gpu, spec, m = compat.mosaic_gpu(), packed.spec, x.shape[0]
    padded = jnp.pad(x, ((0, -m % tokens), (0, spec.tiled_k - spec.k)))
    integers = x.dtype == jnp.int8
    if integers:
        padded = fragments.permute_rows(padded, packed.bits)
    per_scale = fragments.tiles_of(packed.group_size)
    steps, strips = spec.tiled_k // LANES // depth, spec.tiled_n // ROWS // warpgroups * (padded.shape[0] // tokens)
    shares = Shares(steps, strips, min(PROCESSORS, steps * strips))
    on, table = interpreted if interpret else registers, packed.levels is not None
    call = gpu.kernel(
        functools.partial(_kernel, shares, per_scale, packed.bits, on, table),
        out_type=jax.ShapeDtypeStruct((shares.parts, padded.shape[0], spec.tiled_n), jnp.float32),
        grid=(shares.blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            gpu.SMEM((stages, depth, warpgroups, *packed.codes.shape[-2:]), jnp.int32),
            gpu.SMEM((stages, _scales(packed.group_size, depth), warpgroups * ROWS), jnp.float32),
            registers.shared_tile((stages, tokens, depth * LANES), x.dtype),
            gpu.Barrier(num_arrivals=3, num_barriers=stages),
            gpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            *registers.table_places(packed.levels),
            *(interpreted.scratch(warpgroups, tokens, LANES if integers else LANES // 2, x.dtype) if interpret else ()),
        ],
        compiler_params=compat.gpu_params(),
        interpret=compat.gpu_interpreter() if interpret else False,
        kernel_name=f"mpq_{'t' if table else 'w'}{packed.bits}a{width(x.dtype)}",
    )
    parts = call(packed.codes, packed.scales, padded, *registers.table_values(packed.levels))[:, :m, : spec.n]
    total = _added(parts, shares, padded.shape[0] // tokens, ROWS * warpgroups, tokens)
    return total / registers.over(packed.bits) if integers else total


def _added(parts: jax.Array, shares: Shares, batches: int, columns: int, tokens: int) -> jax.Array:
    """The sums of every strip in the order of its blocks; what no block wrote is left out."""
    token, column = (lax.broadcasted_iota(jnp.int32, parts.shape[1:], axis) for axis in (0, 1))
    strip = lax.div(column, columns) * batches + lax.div(token, tokens)
    last = shares.part(shares.last(strip), strip)
    written = [parts[0], *(jnp.where(i <= last, parts[i], 0.0) for i in range(1, shares.parts))]
    return functools.reduce(jnp.add, written)


def _scales(group_size: int | None, depth: int) -> int:
    """Scales of a column that a step needs."""
    return depth if group_size == LANES else 1


def tiles(problem: Problem) -> Config:
    """`(warpgroups, depth, tokens, stages)` from sizes alone: the first of `candidates`."""
    return candidates(problem)[0]


def candidates(problem: Problem) -> tuple[Config, ...]:
    """Three that fit, the likeliest first: as many multiply as registers let, and copies fill the shared memory.

    A power of two as the number of stages makes the place of a step in their ring a mask. Half a register of a thread
    is a token's sum, one for every scale of a step, and with groups one more.
    """
    found = []
    for tokens in dict.fromkeys(_whole(problem.m, size) for size in (64, 128, 256)):
        for warpgroups, depth in ((4, 2), (2, 2), (4, 1), (2, 1)):
            fit = _room(problem) // _stage_bytes(problem, warpgroups, depth, tokens)
            config = (warpgroups, depth, tokens, 1 << min(3, int(math.log2(max(fit, 1)))))
            sums = tokens * (1 if problem.group_size is None else 1 + _scales(problem.group_size, depth))
            if legal(problem, config) and config[3] >= 2 and sums * warpgroups <= 512:
                found.append(config)
    # More sums and operands than four warpgroups have registers for; or few copies ahead.
    worst = lambda config: (config[0] == 4 and config[2] > 32, config[3] < 4, -config[2])
    return tuple(sorted(found, key=worst))[:3]


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
    weight = warpgroups * ROWS * (depth * LANES * problem.bits // 8 + 4 * _scales(problem.group_size, depth))
    return weight + tokens * depth * LANES * x_bytes + 16


def legal(problem: Problem, config: Config) -> bool:
    """Whether tiles divide among warpgroups and steps, groups agree with steps, and shared memory holds the stages."""
    if len(config) != 4 or min(config) < 1:
        return False
    warpgroups, depth, tokens, stages = config
    columns, per_scale = -(-problem.n // LANES) * LANES // ROWS, fragments.tiles_of(problem.group_size)
    whole = columns % warpgroups == 0 and _rows(problem) % depth == 0 and tokens % 8 == 0 and tokens <= 256
    agree = per_scale is None or per_scale == 1 or per_scale % depth == 0
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
    return problem.batch * 5e-6 + max(device.seconds(problem.num_bytes, 0, dot_type(problem)), busy)


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
)
