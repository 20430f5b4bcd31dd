"""Every registered backend computes what the contract says, on one list of matmuls; broken ones are found out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import BACKENDS, LAYOUTS, compat, quantized_matmul, tpu
from kernels_pallas.cases import CONFORMANCE, Case
from kernels_pallas.compat import platform
from kernels_pallas.dispatch import refusal
from kernels_pallas.matmul import describe
from kernels_pallas.native_build import library
from tests.kernel_cases import check, draw


def accepted(name):
    """Cases and layouts that a backend takes."""
    backend = BACKENDS[name]
    for case in CONFORMANCE:
        for layout in (name for name in layouts(case) if name in (backend.layouts or ("plain",))):
            x, packed, _ = draw(case, layout, 0, exact=True)
            problem = describe(x, packed, case.activation_bits)
            if refusal(backend, problem, (backend.platforms or ("cpu",))[0], interpret=False) is None:
                yield case, layout


def layouts(case):
    return [name for name, layout in LAYOUTS.items() if layout.refuses(case.spec) is None]


def runs():
    """Every backend that runs here, on every case that it takes; the reference on plain weights alone, to save time."""
    accelerator = {"cuda": [pytest.mark.gpu], "tpu": [pytest.mark.tpu]}.get(platform(), [])
    for name, backend in BACKENDS.items():
        native = platform() in backend.platforms
        if backend.interpretable or native:
            for case, layout in accepted(name):
                marks = accelerator if native else []
                yield pytest.param(name, case, layout, id=f"{name}-{layout}-{case}", marks=marks)


def call(name, case, x, packed):
    interpret = bool(BACKENDS[name].platforms) and platform() not in BACKENDS[name].platforms
    return quantized_matmul(
        x,
        packed,
        activation_bits=case.activation_bits,
        backend=name,
        out_dtype=jnp.float32,
        interpret=interpret,
    )


@pytest.mark.parametrize(("name", "case", "layout"), list(runs()))
def test_equals_the_oracle(name, case, layout):
    run = jax.jit(functools.partial(call, name, case))
    for exact in (True, False):
        check(run, case, layout, exact, rounded=name == "dense")
        if name == "tpu" and platform() != "tpu":
            assert compat.races_found() is False


def test_every_backend_takes_some_of_the_list():
    """One that refuses everything would pass by running nothing."""
    counts = {name: len(list(accepted(name))) for name in BACKENDS}
    assert counts.pop("reference") == len(CONFORMANCE)
    assert counts.pop("hopper") >= 7
    if isinstance(library(), str):  # a machine without a compiler
        assert counts.pop("native") == 0
    assert min(counts.values()) >= 8


@pytest.mark.parametrize("case", CONFORMANCE, ids=str)
def test_auto_works_wherever_the_reference_does(case):
    """On plain weights, and as traced for any platform on any layout."""
    for layout in layouts(case):
        x, packed, _ = draw(case, layout, 0, exact=True)
        for target in ("cpu", "tpu", "cuda"):
            run = functools.partial(quantized_matmul, activation_bits=case.activation_bits, platform=target)
            assert jax.eval_shape(run, x, packed).shape == (*case.batch, case.m, case.n)


def read_before_it_came(x_ref, y_ref, copy_ref, semaphore):
    copy = pltpu.make_async_copy(x_ref, copy_ref, semaphore)
    copy.start()
    y_ref[...] = copy_ref[...]
    copy.wait()


def test_a_race_is_found():
    x = jnp.ones((8, 128), jnp.float32)
    run = pl.pallas_call(
        read_before_it_came,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[compat.tpu_scratch(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=compat.tpu_interpreter(),
    )
    jax.block_until_ready(jax.jit(run)(x))
    assert compat.races_found() is True


# Mutants of a backend: each must fail the check that the original passes.

MUTATED = Case(3, 256, 24, 4, 64, zeros=True, x_dtype="float32")


@functools.cache
def sound(name):
    return jax.jit(functools.partial(call, name, MUTATED))


def swapped_nibbles(run, x, packed):
    if packed.layout == "tpu":  # codes of one byte are neighbours, of two rows
        codes = packed.codes.reshape(-1, 2, packed.codes.shape[-1])[:, ::-1].reshape(packed.codes.shape)
    else:
        codes = (packed.codes << 4) | (packed.codes >> 4)
    return run(x, dataclasses.replace(packed, codes=codes))


def wrong_scale_row(run, x, packed):
    groups = -3 if packed.layout == "tpu" else -2
    return run(x, dataclasses.replace(packed, scales=jnp.roll(packed.scales, 1, axis=groups)))


def forgotten_zero_points(run, x, packed):
    return run(x, dataclasses.replace(packed, zeros=None))


def lost_last_row(run, x, packed):
    return run(x.at[..., -1].set(0), packed)


def sixteen_bit_partial_sums(run, x, packed):
    """The exact result, but sums of a group are rounded to bfloat16 before they are added up in float32."""
    size = packed.group_size
    rows = [x.at[:, : g * size].set(0).at[:, (g + 1) * size :].set(0) for g in range(packed.spec.groups)]
    return sum(run(row, packed).astype(jnp.bfloat16).astype(jnp.float32) for row in rows)


MUTANTS = [swapped_nibbles, wrong_scale_row, forgotten_zero_points, lost_last_row, sixteen_bit_partial_sums]
MUTABLE = ["reference", "cpu", "tpu", *([] if isinstance(library(), str) else ["native"])]


@pytest.mark.parametrize("exact", [True, False], ids=["integers", "random"])
@pytest.mark.parametrize("name", MUTABLE)
class TestTheSuiteItself:
    def layout(self, name):
        return (BACKENDS[name].layouts or ("plain",))[0]

    def test_a_sound_kernel_passes(self, name, exact):
        check(sound(name), MUTATED, self.layout(name), exact)

    @pytest.mark.parametrize("mutant", MUTANTS)
    def test_a_broken_kernel_fails(self, mutant, name, exact):
        with pytest.raises(AssertionError):
            check(functools.partial(mutant, sound(name)), MUTATED, self.layout(name), exact)


def test_a_tpu_kernel_that_rounds_its_partial_sums_fails(monkeypatch):
    """The mutant in the kernel itself."""
    partial = tpu._partial
    monkeypatch.setattr(tpu, "_partial", lambda x, w: partial(x, w).astype(jnp.bfloat16).astype(jnp.float32))
    for exact in (True, False):
        with pytest.raises(AssertionError):
            check(jax.jit(functools.partial(call, "tpu", MUTATED)), MUTATED, "tpu", exact)
