"""The kernels in C: every instruction set of this machine, any number of threads, machines that cannot have them."""

import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import BACKENDS, KernelError, native, native_build, pack, quantized_matmul
from kernels_pallas.cases import CONFORMANCE, Case, draw
from kernels_pallas.dispatch import choose
from kernels_pallas.matmul import describe
from tests.conformance.test_every_kernel import MUTANTS
from tests.kernel_cases import check

FOUND = native_build.library()
needs_library = pytest.mark.skipif(isinstance(FOUND, str), reason=f"no native kernels: {FOUND}")
FEW, MANY = 10**6, 1
KERNELS = () if isinstance(FOUND, str) else FOUND.kernels

# Beside the common list: all tiles of tokens at once, segments longer than what is kept near, and tails of every kind.
MORE = (
    Case(15, 2100, 3, 8, x_dtype="float32"),
    Case(15, 4500, 2, 8, activation_bits=8),
    Case(3, 70, 70, 4, 16, activation_bits=8, x_dtype="float32"),
    Case(2, 66, 5, 2, 33, zeros=True, x_dtype="float32"),
    Case(1, 1030, 67, 4, nf4=True, x_dtype="float32"),
)
# For the way of many tokens: tiles of every size, some columns behind the last whole panel, slabs of several rows of
# bytes and of parts of one, words that end within a group, segments that only fill bytes, several blocks of columns.
PANELS = (
    Case(25, 300, 97, 4, 32, zeros=True, x_dtype="float32"),
    Case(13, 1100, 33, 8, activation_bits=8),
    Case(9, 610, 70, 4, 33, activation_bits=8, x_dtype="float32"),
    Case(19, 2500, 31, 4, activation_bits=8, x_dtype="float32"),
    Case(17, 1200, 45, 2, 64, activation_bits=8, zeros=True),
    Case(14, 700, 50, 2, x_dtype="float32"),
    Case(16, 330, 600, 8, 66, x_dtype="float32"),
    Case(8, 90, 1100, 4, 30, activation_bits=8, x_dtype="float32"),
    Case(13, 2500, 270, 8, activation_bits=8),
    Case(6, 420, 40, 4, 70, nf4=True, x_dtype="float32"),
    Case(24, 50, 64, 8, 1, activation_bits=8, x_dtype="float32"),
)
HELD = [case for case in (*CONFORMANCE, *MORE) if case.bits in (8, 4, 2) and not case.batch]


@needs_library
@pytest.mark.parametrize("case", HELD, ids=str)
def test_every_instruction_set_equals_the_oracle_with_few_tokens(case):
    check_all(case, FEW)


@needs_library
@pytest.mark.parametrize("case", [*HELD, *PANELS], ids=str)
def test_every_instruction_set_equals_the_oracle_with_many_tokens(case):
    check_all(case, MANY)


@needs_library
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_broken_weights_are_found_with_many_tokens(activation_bits):
    case = Case(13, 256, 40, 4, 64, activation_bits, zeros=True, x_dtype="float32")
    backend = native_backend(KERNELS[0], MANY)
    run = jax.jit(lambda x, packed: backend(x, packed, activation_bits))
    check(run, case, "cpu", exact=True)
    for mutant in MUTANTS[: 4 if activation_bits else None]:  # rounding again would hide what the last one does
        with pytest.raises(AssertionError):
            check(functools.partial(mutant, run), case, "cpu", exact=True)


def native_backend(isa, least):
    run = lambda x, packed, config, interpret: native.matmul(x, packed, isa, least)
    return dataclasses.replace(BACKENDS["native"], run=run)


def check_all(case, least):
    """All instruction sets in one function, which is compiled once."""
    backends = {isa: native_backend(isa, least) for isa in KERNELS}
    run = jax.jit(
        lambda x, packed: {isa: multiply(x, packed, case.activation_bits) for isa, multiply in backends.items()}
    )
    for isa in KERNELS:
        # Longer sums of integers are not exact in float32.
        for exact in (True, False) if case.k << case.bits < 2**18 else (False,):
            check(lambda x, packed, isa=isa: run(x, packed)[isa], case, "cpu", exact)


@needs_library
def test_the_instruction_sets_are_those_of_the_processor():
    assert KERNELS[-1] == "base"
    x, packed, _ = draw(HELD[0], "cpu", 0, exact=True)
    run = jax.jit(lambda x, packed: native.matmul(x, packed, "abacus"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="this machine has no abacus"):
        run(x, packed).block_until_ready()


SHARED = (
    Case(9, 512, 1500, 4, 64, x_dtype="float32"),
    Case(2, 1024, 2000, 8, activation_bits=8),
    Case(40, 512, 1500, 4, 64, x_dtype="float32"),
    Case(200, 512, 70, 8, activation_bits=8),  # too few columns for all threads, which share out tokens
)


def digest():
    """Of products large enough to be shared out."""
    parts = []
    for case in SHARED:
        x, packed, _ = draw(case, "cpu", 3, exact=False)
        run = functools.partial(quantized_matmul, activation_bits=case.activation_bits, backend="native")
        parts.append(np.asarray(jax.jit(run)(x, packed), np.float32).tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()


@needs_library
def test_the_bits_do_not_depend_on_the_threads():
    alone = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    program = alone + "from tests.test_kernels_native import digest; print(digest())"
    assert len(os.sched_getaffinity(0)) > 1, "this needs two processors"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == digest()


@needs_library
def test_experts_and_mapped_functions():
    x, packed, _ = draw(Case(3, 64, 8, 4, 32, batch=(2,), x_dtype="float32"), "cpu", 0, exact=True)
    run = functools.partial(quantized_matmul, backend="native")
    got = jax.jit(run)(x, packed)
    np.testing.assert_array_equal(jax.jit(jax.vmap(native.matmul))(x, packed), got)
    one = jax.tree.map(lambda leaf: leaf[1], packed)
    np.testing.assert_array_equal(jax.jit(run)(x[1], one), got[1])


class TestWithout:
    """Machines without a compiler, or with one that fails."""

    @pytest.fixture(autouse=True)
    def _forget(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(native, "library", native_build.library.__wrapped__)

    def refused(self, reason):
        x, packed, _ = draw(HELD[0], "cpu", 0, exact=True)
        with pytest.raises(KernelError) as error:
            quantized_matmul(x, packed, backend="native")
        assert str(error.value) == f"backend 'native' cannot compute this matmul: {reason}"
        with pytest.raises(KernelError) as error:
            native.matmul(x, packed)
        assert str(error.value) == f"the native kernels are not there: {reason}"
        assert choose(describe(x, packed, None), "cpu", ())[0] in ("cpu", "reference")
        assert quantized_matmul(x, packed).shape == (HELD[0].m, HELD[0].n)

    def test_nothing_is_found(self, monkeypatch):
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "")
        self.refused("there is no C++ compiler: install one or set CXX")

    def test_it_does_not_exist(self, monkeypatch):
        monkeypatch.setenv("CXX", "/nowhere/c++ -Wall")
        self.refused("it cannot be compiled or loaded: No such file or directory")

    def test_it_fails(self, monkeypatch, tmp_path):
        broken = tmp_path / "c++"
        broken.write_text(
            "#!/bin/sh\n[ $2 = --version ] && exit 0\necho 'In file x:' >&2\necho 'x: error: no' >&2\nexit 1\n"
        )
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", f"{broken} -m")
        self.refused(f"{broken} failed: x: error: no")
        assert not list((tmp_path / "mpq" / "native").iterdir())

    def test_it_says_nothing(self, monkeypatch):
        monkeypatch.setenv("CXX", "false")
        self.refused("false failed: it says nothing")

    def test_it_is_not_wanted(self, monkeypatch):
        monkeypatch.setenv("MPQ_NATIVE", "0")
        self.refused("MPQ_NATIVE=0 asks to do without")

    def test_the_processor_is_too_old(self, monkeypatch, tmp_path):
        old = native_build.Library(tmp_path, ("base",))
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.setattr(native, "library", lambda: old)
        x, packed, _ = draw(HELD[0], "cpu", 0, exact=True)
        with pytest.raises(KernelError, match=r"'native' cannot compute this matmul: this processor has no AVX2$"):
            quantized_matmul(x, packed, backend="native")
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
        assert old.fast


@needs_library
def test_a_library_is_compiled_once_for_what_it_is_made_from(tmp_path, monkeypatch):
    made = []

    def run(steps, folder):
        made.extend(steps)
        Path(folder, "native.so").touch()

    monkeypatch.setattr(native_build, "_run", run)
    first = native_build.build(("c++",), tmp_path)
    count = len(made)
    assert count >= 3
    assert native_build.build(("c++",), tmp_path) == first
    assert len(made) == count
    monkeypatch.setattr(native_build.jaxlib, "__version__", "0.0.1")
    other = native_build.build(("c++",), tmp_path)
    assert other != first
    assert sorted(tmp_path.iterdir()) == sorted([first, other])


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native_build.cache_folder() == tmp_path / "mpq" / "native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native_build.cache_folder() == tmp_path / ".cache" / "mpq" / "native"


def test_tables_of_wide_codes_are_refused():
    x = jnp.zeros((1, 16), jnp.float32)
    codes, scales = np.zeros((16, 4), np.int8), np.ones((1, 4), np.float32)
    packed = pack(codes, scales, bits=8, group_size=None, layout="cpu", levels=(0.0, 1.0))
    with pytest.raises(KernelError, match=r"codes of a table have 8 bits, allowed are 4, 2$"):
        quantized_matmul(x, packed, backend="native")
