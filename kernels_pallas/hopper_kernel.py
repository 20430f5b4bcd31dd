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
import functools
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

COPYING = 40
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
    return min(232, (share * (warpgroups + 1) - COPYING) // warpgroups // 8 * 8)


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
    table, scaled = form.table, form.scaled
    (w, s, x), more = refs[:3], refs[3:]
    token_scales, values, (y, handed, w_tile, s_tile, x_tile, full, free, *more) = (
        more[:scaled],
        more[scaled : scaled + table],
        more[scaled + table :],
    )
    places, scratch = more[: 2 * table], more[2 * table :]
    gpu, shares, on = compat.mosaic_gpu(), form.shares, form.on
    thread = lax.axis_index("warpgroup")
    # Processors get blocks in their order, so that whoever waits for a sum waits for one that runs or has run.
    block = shares.blocks - 1 - lax.axis_index("block")
    lane = lax.axis_index("cluster") if form.cluster > 1 else 0
    stages, depth, warpgroups = w_tile.shape[:3]
    scales, tokens, experts = s_tile.shape[1], x_tile.shape[1], y.shape[1]
    batches, steps = y.shape[2] // tokens, shares.steps
    begin, end = shares.begin(block), shares.begin(block + 1)
    ring = lambda step: lax.rem(step - begin, stages)

    def place(strip: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        """Expert, first tile of columns and first token of a strip."""
        each = shares.strips // experts
        expert, within = (0, strip) if experts == 1 else (lax.div(strip, each), lax.rem(strip, each))
        column = lax.div(within, batches) * form.cluster + lane
        return expert, column * warpgroups, lax.rem(within, batches) * tokens

    @pl.when(thread == warpgroups)
    def _copy() -> None:
        gpu.set_max_registers(COPYING, action="decrease")
        shared = {"collective_axes": "cluster"} if form.cluster > 1 else {}

        def _wait(step: jax.Array) -> None:
            """Until the place of a step is free."""

            @pl.when(step - begin >= stages)
            def _() -> None:
                gpu.barrier_wait(free.at[ring(step)])

        def ahead(step: jax.Array, carry: jax.Array) -> jax.Array:
            slot, strip = ring(step), lax.div(step, steps)

            _wait(step)
            row, (expert, first, token) = lax.rem(step, steps) * depth, place(strip)
            codes = w.at[expert, pl.ds(row, depth), pl.ds(first, warpgroups)]
            of_groups = s.at[
                expert, pl.ds(first_group(row, form.group_size), scales), pl.ds(first * ROWS, warpgroups * ROWS)
            ]
            part = x.at[expert, pl.ds(token, tokens), pl.ds(row * LANES, depth * LANES)]
            gpu.copy_gmem_to_smem(codes, w_tile.at[slot], full.at[slot])
            gpu.copy_gmem_to_smem(of_groups, s_tile.at[slot], full.at[slot])
            gpu.copy_gmem_to_smem(part, x_tile.at[slot], full.at[slot], **shared)
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
        sums = gpu.ACC((ROWS, tokens), jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
        rows = part_rows(form.group_size, x.dtype == jnp.int8)
        wide = operand_rows(form.group_size, x.dtype == jnp.int8)
        parts = LANES // rows
        per_scale = depth * parts // scales

        def products(slot: jax.Array, first: int, held: Mapping[int, jax.Array], *into: Any) -> list[jax.Array]:
            """Adds the products of some scales of a step, from the first on, to an accumulator each; the scales.

            `held` has tiles whose words are in registers already. At most two parts are decoded there: one that the
            tensor cores have, and one that is to follow.
            """
            held = dict(held)
            for i in range(per_scale * len(into)):
                if i > 1:
                    on.finish_all_but(1)
                tile, part = divmod(first * per_scale + i, parts)
                if tile not in held:
                    held[tile] = on.held(w_tile.at[slot, tile, thread])
                pairs = places[0] if table else None
                operand = on.operand(held[tile], part, parts, form.bits, pairs, x.dtype, wide // rows)
                its_rows = pl.ds((tile * LANES + part * rows) // wide * wide, wide)
                on.multiply(into[i // per_scale], operand, x_tile.at[slot, :, its_rows], thread, scratch)
            columns = pl.ds(thread * ROWS, ROWS)
            found = [on.column_scales(s_tile.at[slot, first + i, columns]) for i in range(len(into))]
            on.finish_all_but(0)
            return found

        def by_groups(first: jax.Array, last: jax.Array) -> jax.Array:
            def one(step: jax.Array, total: jax.Array) -> jax.Array:
                slot, held = ring(step), {}
                gpu.barrier_wait(full.at[slot])
                for scale in range(0, scales, 2):
                    tile = scale * per_scale // parts
                    if 2 * per_scale < parts and tile not in held:  # more than two scales have a part of it
                        held[tile] = on.held(w_tile.at[slot, tile, thread])

                    def add(*into: Any, scale: int = scale, total: jax.Array = total) -> jax.Array:
                        found = products(slot, scale, held, *into)
                        if scale + len(into) == scales:
                            gpu.barrier_arrive(free.at[slot])
                        return functools.reduce(jnp.add, map(_scaled, into, found), total)

                    total = pl.run_scoped(add, *[sums] * min(2, scales - scale))
                return total

            return lax.fori_loop(first, last, one, on.zeros(ROWS, tokens))

        def at_once(first: jax.Array, last: jax.Array) -> jax.Array:
            def all_rows(into: Any) -> jax.Array:
                def one(step: jax.Array, scale: jax.Array) -> jax.Array:
                    slot = ring(step)
                    gpu.barrier_wait(full.at[slot])
                    (scale,) = products(slot, 0, {}, into)
                    gpu.barrier_arrive(free.at[slot])
                    return scale

                return _scaled(into, lax.fori_loop(first, last, one, on.zeros(ROWS)))

            return pl.run_scoped(all_rows, sums)

        waits = shares.inside and shares.split
        flags = on.flags(shares.blocks * form.cluster * warpgroups) if waits else None

        def its(block: jax.Array) -> jax.Array:
            """The place of a block, and among its cluster, in what is handed on."""
            return block * form.cluster + lane

        def hand_on(total: jax.Array) -> None:
            on.keep(handed.at[its(block), thread], total)
            on.raise_flag(flags, its(block) * warpgroups + thread)

        def collected(strip: jax.Array, total: jax.Array) -> jax.Array:
            def add(other: jax.Array, total: jax.Array) -> jax.Array:
                on.await_flag(flags, its(other) * warpgroups + thread)
                return total + on.kept(handed.at[its(other), thread])

            return lax.fori_loop(block + 1, shares.last(strip) + 1, add, total)

        def write(strip: jax.Array, total: jax.Array) -> None:
            expert, first, token = place(strip)
            if scaled:
                factor = on.token_scales(token_scales[0].at[expert, pl.ds(token, tokens)])
                total = total * lax.broadcast_in_dim(factor, total.shape, [1])
            part = 0 if shares.parts == 1 else shares.part(block, strip)
            on.store(y.at[part, expert, pl.ds(token, tokens), pl.ds((first + thread) * ROWS, ROWS)], total)

        def strip_(strip: jax.Array, carry: jax.Array) -> jax.Array:
            bounds = lax.max(begin, strip * steps), lax.min(end, (strip + 1) * steps)
            total = (at_once if form.group_size is None else by_groups)(*bounds)
            if waits:
                pl.when(begin > strip * steps)(lambda: hand_on(total))
                pl.when(begin <= strip * steps)(lambda: write(strip, collected(strip, total)))
            else:
                write(strip, total)
            return carry

        if table:
            gpu.barrier_wait(places[1])
        lax.fori_loop(lax.div(begin, steps), lax.div(end - 1, steps) + 1, strip_, jnp.int32(0))


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
