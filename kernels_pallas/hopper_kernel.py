"""The body of Hopper's kernel: what each warpgroup of a block does. `hopper` says what it computes, and why so.

A step is `depth` tiles of `LANES` rows of as many columns as the block has. Each of its warpgroups that multiply takes
`ROWS` of those, part by part: a part is the rows of one operand of the tensor cores, at most those of a group. Parts
that share a scale share an accumulator, and at most two of these are under way: one that the tensor cores have, and one
that is decoded for.

Blocks of a cluster have neighbouring columns and the same steps. Each fetches its share of the activations for all of
them, so that the second cache is asked for these once a cluster and not once a block. A place in shared memory is free
when all blocks of the cluster have read it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat, registers
from kernels_pallas.backend import Config
from kernels_pallas.fragments import LANES, ROWS
from kernels_pallas.shares import Shares

COPYING = 24
"""Registers of a thread that copies."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static about a kernel.

    Attributes:
      shares: which steps are whose.
      group_size: rows that share a scale; None: all.
      bits: of a code.
      on: `registers`, or its twin for the interpreter.
      table: whether a table of values, `registers.pairs`, is an operand.
      scaled: whether factors of tokens are.
      cluster: blocks that share activations.
    """

    shares: Shares
    group_size: int | None
    bits: int
    on: Any
    table: bool
    scaled: bool
    cluster: int


def part_rows(group_size: int | None, integers: bool) -> int:
    """Rows of a part: as many as a swizzled line of activations has, and no more than share a scale."""
    return min(LANES if integers else LANES // 2, group_size or LANES)


def operand_rows(group_size: int | None, integers: bool) -> int:
    """Rows of an operand: those of a part; of int8 at least 64, which Mosaic asks for, filled with zeros."""
    return max(part_rows(group_size, integers), LANES // 2 if integers else 0)


def scales_of(group_size: int | None, depth: int) -> int:
    """Scales of a column that a step needs."""
    return 1 if group_size is None else max(1, depth * LANES // group_size)


def most_registers(warpgroups: int) -> int:
    """Of a thread that multiplies, by eights.

    Threads start with equal shares of the 65,536 of a processor, at most 248. Those that multiply wait for more until
    those that copy have given theirs away, forever if there are too few.
    """
    share = min(248, 65536 // (128 * (warpgroups + 1)) // 8 * 8)
    return min(240, (share * (warpgroups + 1) - COPYING) // warpgroups // 8 * 8)


def kernel(form: Form, *refs: Any) -> None:
    """One block: `w[e, k / 128, n / 64, words, 128]`, `s[e, groups, n]`, `x[e, m, k]` to `y[parts, e, m, n]`.

    They are in global memory, for each of e experts, as is `handed[blocks, warpgroups, 64, m]`, the sums that blocks
    hand on if there is no second pass (`shares`). Tiles of the first three are in shared memory, with barriers that say
    which are full and which are free.

    Args:
      form: what is static.
      refs: w, s, x, what `t[e, m]` a token's sums are multiplied by and the table, each if there is one, y, handed, the
        tiles, the barriers, the table's place and barrier, and what the interpreter's twin needs.
    """
    block, thread = _Block(form, refs), lax.axis_index("warpgroup")
    pl.when(thread == block.warpgroups)(lambda: _copy(block))
    pl.when(thread < block.warpgroups)(lambda: _Warpgroup(block, thread).run())


class _Block:
    """The operands of a block by their names, its sizes, and its steps."""

    def __init__(self, form: Form, refs: Sequence[Any]) -> None:
        """Of the arguments of `kernel`."""
        self.form, rest = form, list(refs)
        take = lambda count: [rest.pop(0) for _ in range(count)]
        self.w, self.s, self.x = take(3)
        self.factors, self.values = take(form.scaled), take(form.table)
        self.y, self.handed, self.w_tile, self.s_tile, self.x_tile, self.full, self.free = take(7)
        self.places, self.scratch = take(2 * form.table), rest
        self.stages, self.depth, self.warpgroups = self.w_tile.shape[:3]
        self.scales, self.tokens = self.s_tile.shape[1], self.x_tile.shape[1]
        self.integers = self.x.dtype == jnp.int8
        # Processors get blocks in their order, so that whoever waits for a sum waits for one that runs or has run.
        self.number = form.shares.blocks - 1 - lax.axis_index("block")
        self.lane = lax.axis_index("cluster") if form.cluster > 1 else 0
        self.begin, self.end = form.shares.begin(self.number), form.shares.begin(self.number + 1)

    def ring(self, step: jax.Array) -> jax.Array:
        """The place of a step in shared memory."""
        return lax.rem(step - self.begin, self.stages)

    def place(self, strip: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        """Expert, first tile of columns and first token of a strip."""
        experts, batches = self.y.shape[1], self.y.shape[2] // self.tokens
        each = self.form.shares.strips // experts
        expert, within = (0, strip) if experts == 1 else (lax.div(strip, each), lax.rem(strip, each))
        column = lax.div(within, batches) * self.form.cluster + self.lane
        return expert, column * self.warpgroups, lax.rem(within, batches) * self.tokens


def _copy(block: _Block) -> None:
    """Copies the tiles of all steps, as far ahead as there are places, and stays until the last is free again."""
    gpu, form = compat.mosaic_gpu(), block.form
    gpu.set_max_registers(COPYING, action="decrease")
    shared = {"collective_axes": "cluster"} if form.cluster > 1 else {}

    def wait(step: jax.Array) -> None:
        """Until the place of a step is free."""
        is_used = step - block.begin >= block.stages
        pl.when(is_used)(lambda: gpu.barrier_wait(block.free.at[block.ring(step)]))

    def ahead(step: jax.Array, carry: jax.Array) -> jax.Array:
        slot, strip = block.ring(step), lax.div(step, form.shares.steps)
        wait(step)
        row, (expert, first, token) = lax.rem(step, form.shares.steps) * block.depth, block.place(strip)
        codes = block.w.at[expert, pl.ds(row, block.depth), pl.ds(first, block.warpgroups)]
        groups = pl.ds(first_group(row, form.group_size), block.scales)
        scales = block.s.at[expert, groups, pl.ds(first * ROWS, block.warpgroups * ROWS)]
        part = block.x.at[expert, pl.ds(token, block.tokens), pl.ds(row * LANES, block.depth * LANES)]
        gpu.copy_gmem_to_smem(codes, block.w_tile.at[slot], block.full.at[slot])
        gpu.copy_gmem_to_smem(scales, block.s_tile.at[slot], block.full.at[slot])
        gpu.copy_gmem_to_smem(part, block.x_tile.at[slot], block.full.at[slot], **shared)
        return carry

    def behind(step: jax.Array, carry: jax.Array) -> jax.Array:
        wait(step)
        return carry

    if form.table:
        gpu.copy_gmem_to_smem(*block.values, *block.places)
    lax.fori_loop(block.begin, block.end, ahead, jnp.int32(0))
    lax.fori_loop(block.end, block.end + block.stages, behind, jnp.int32(0))


class _Warpgroup:
    """One that multiplies: `ROWS` columns of every strip."""

    def __init__(self, block: _Block, thread: jax.Array) -> None:
        """The warpgroup of this number."""
        form = block.form
        self.block, self.thread, self.on, self.shares = block, thread, form.on, form.shares
        self.rows = part_rows(form.group_size, block.integers)
        self.wide = operand_rows(form.group_size, block.integers)
        self.parts = LANES // self.rows
        self.per_scale = block.depth * self.parts // block.scales
        self.sums = compat.mosaic_gpu().ACC((ROWS, block.tokens), jnp.int32 if block.integers else jnp.float32)
        self.waits = self.shares.inside and self.shares.split

    def run(self) -> None:
        """All strips that the block has steps of."""
        gpu, block, steps = compat.mosaic_gpu(), self.block, self.shares.steps
        gpu.set_max_registers(most_registers(block.warpgroups), action="increase")
        flags = self.on.flags(self.shares.blocks * block.form.cluster * block.warpgroups) if self.waits else None

        def strip_(strip: jax.Array, carry: jax.Array) -> jax.Array:
            bounds = lax.max(block.begin, strip * steps), lax.min(block.end, (strip + 1) * steps)
            total = (self.at_once if block.form.group_size is None else self.by_groups)(*bounds)
            if self.waits:
                is_first = block.begin <= strip * steps
                pl.when(jnp.logical_not(is_first))(lambda: self.hand_on(flags, total))
                pl.when(is_first)(lambda: self.write(strip, self.collected(flags, strip, total)))
            else:
                self.write(strip, total)
            return carry

        if block.form.table:
            gpu.barrier_wait(block.places[1])
        lax.fori_loop(lax.div(block.begin, steps), lax.div(block.end - 1, steps) + 1, strip_, jnp.int32(0))

    def begin_products(self, slot: jax.Array, first: int, held: Mapping[int, jax.Array], *into: Any) -> None:
        """Begins to add the products of some scales of a step, from the first on, to an accumulator each.

        `held` has tiles whose words are in registers already. At most two parts are decoded there: one that the tensor
        cores have, and one that is to follow.
        """
        on, block, held = self.on, self.block, dict(held)
        for i in range(self.per_scale * len(into)):
            if i > 1:
                on.finish_all_but(1)
            tile, part = divmod(first * self.per_scale + i, self.parts)
            if tile not in held:
                held[tile] = on.held(block.w_tile.at[slot, tile, self.thread])
            pairs = block.places[0] if block.form.table else None
            shape = (part, self.parts, block.form.bits, pairs, block.x.dtype, self.wide // self.rows)
            rows = pl.ds((tile * LANES + part * self.rows) // self.wide * self.wide, self.wide)
            operand, x = on.operand(held[tile], *shape), block.x_tile.at[slot, :, rows]
            on.multiply(into[i // self.per_scale], operand, x, self.thread, block.scratch)

    def scale(self, slot: jax.Array, number: int) -> jax.Array:
        """One of the scales of a step."""
        return self.on.column_scales(self.block.s_tile.at[slot, number, pl.ds(self.thread * ROWS, ROWS)])

    def by_groups(self, first: jax.Array, last: jax.Array) -> jax.Array:
        """The sum of some steps of a strip, whose partial sums meet their scales in float32.

        Of two accumulators the first meets its scale while the tensor cores still have the second.
        """
        gpu, block = compat.mosaic_gpu(), self.block

        def one(step: jax.Array, total: jax.Array) -> jax.Array:
            slot, held = block.ring(step), {}
            gpu.barrier_wait(block.full.at[slot])
            for first_scale in range(0, block.scales, 2):
                tile = first_scale * self.per_scale // self.parts
                if 2 * self.per_scale < self.parts and tile not in held:  # more than two scales have a part of it
                    held[tile] = self.on.held(block.w_tile.at[slot, tile, self.thread])

                def add(*into: Any, first_scale: int = first_scale, total: jax.Array = total) -> jax.Array:
                    self.begin_products(slot, first_scale, held, *into)
                    for i, sums in enumerate(into):
                        scale = self.scale(slot, first_scale + i)
                        self.on.finish_all_but((len(into) - 1 - i) * self.per_scale)
                        if first_scale + i + 1 == block.scales:
                            gpu.barrier_arrive(block.free.at[slot])
                        total = total + _scaled(sums, scale)
                    return total

                total = pl.run_scoped(add, *[self.sums] * min(2, block.scales - first_scale))
            return total

        return lax.fori_loop(first, last, one, self.on.zeros(ROWS, block.tokens))

    def at_once(self, first: jax.Array, last: jax.Array) -> jax.Array:
        """The same where one scale is that of all rows, in one accumulator."""
        gpu, block = compat.mosaic_gpu(), self.block

        def all_rows(into: Any) -> jax.Array:
            def one(step: jax.Array, scale: jax.Array) -> jax.Array:
                slot = block.ring(step)
                gpu.barrier_wait(block.full.at[slot])
                self.begin_products(slot, 0, {}, into)
                scale = self.scale(slot, 0)
                self.on.finish_all_but(0)
                gpu.barrier_arrive(block.free.at[slot])
                return scale

            return _scaled(into, lax.fori_loop(first, last, one, self.on.zeros(ROWS)))

        return pl.run_scoped(all_rows, self.sums)

    def place(self, number: jax.Array) -> jax.Array:
        """Of a block, or of this one's neighbour in its cluster, in what is handed on."""
        return number * self.block.form.cluster + self.block.lane

    def hand_on(self, flags: Any, total: jax.Array) -> None:
        """The sum of a strip that another block began."""
        place = self.place(self.block.number)
        self.on.keep(self.block.handed.at[place, self.thread], total)
        self.on.raise_flag(flags, place * self.block.warpgroups + self.thread)

    def collected(self, flags: Any, strip: jax.Array, total: jax.Array) -> jax.Array:
        """The sum with what the blocks behind have of the strip."""

        def add(number: jax.Array, total: jax.Array) -> jax.Array:
            self.on.await_flag(flags, self.place(number) * self.block.warpgroups + self.thread)
            return total + self.on.kept(self.block.handed.at[self.place(number), self.thread])

        return lax.fori_loop(self.block.number + 1, self.shares.last(strip) + 1, add, total)

    def write(self, strip: jax.Array, total: jax.Array) -> None:
        """A strip's sum, or this block's part of it, to where it belongs."""
        block = self.block
        expert, first, token = block.place(strip)
        tokens = pl.ds(token, block.tokens)
        if block.form.scaled:
            factor = self.on.token_scales(block.factors[0].at[expert, tokens])
            total = total * lax.broadcast_in_dim(factor, total.shape, [1])
        part = 0 if self.shares.parts == 1 else self.shares.part(block.number, strip)
        self.on.store(block.y.at[part, expert, tokens, pl.ds((first + self.thread) * ROWS, ROWS)], total)


def first_group(tile: jax.Array, group_size: int | None) -> Any:
    """Of the first row of a tile."""
    if group_size is None:
        return 0
    return tile * (LANES // group_size) if group_size < LANES else lax.div(tile, group_size // LANES)


def _scaled(into: Any, scale: jax.Array) -> jax.Array:
    part = into[...].astype(jnp.float32)
    return part * lax.broadcast_in_dim(scale, part.shape, [0])


def barriers(stages: int, warpgroups: int, cluster: int) -> Sequence[Any]:
    """Which say that a place is full, by three copies, and free, by all that multiply."""
    gpu = compat.mosaic_gpu()
    full = gpu.Barrier(num_arrivals=3, num_barriers=stages)
    if cluster == 1:
        return full, gpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
    return full, gpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=warpgroups, num_barriers=stages)


def tiles_in_shared_memory(form: Form, config: Config, words: int, dtype: Any) -> Sequence[Any]:
    """Of codes, of which a thread has so many words of a tile, of scales, and of activations of a dtype."""
    warpgroups, depth, tokens, stages, _ = config
    gpu = compat.mosaic_gpu()
    rows = operand_rows(form.group_size, jnp.dtype(dtype) == jnp.int8)
    return (
        gpu.SMEM((stages, depth, warpgroups, words, LANES), jnp.int32),
        gpu.SMEM((stages, scales_of(form.group_size, depth), warpgroups * ROWS), jnp.float32),
        registers.shared_tile((stages, tokens, depth * LANES), dtype, rows),
    )
