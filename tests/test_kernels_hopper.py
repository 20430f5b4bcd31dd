"""What of Hopper's kernels needs no GPU: the order of codes, every instruction that decodes them, and who does what.

The instructions are run by an emulator of the few that there are (PTX ISA 8.8, chapter 9). The kernel itself runs in
Pallas's interpreter, in a process whose client has a thread for every warpgroup.
"""

import json
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import BACKENDS, compat, fragments, hopper, hopper_kernel, hopper_round, registers, timers
from kernels_pallas.cases import DECODE, Case, fill, shapes
from kernels_pallas.matmul import describe
from kernels_pallas.packed import NF4
from kernels_pallas.reference import quantize_tokens
from kernels_pallas.shares import Shares

LANE_TABLE = 1024


def emulate(text, *operands, memory=None):
    """`$0` of one asm text, for words `$1`, `$2`, ..."""
    held = {f"${i}": int(word) & 0xFFFFFFFF for i, word in enumerate(operands, 1)}
    body = re.sub(r"^\{ *\.reg [^;]*;", "", text.strip()).rstrip("} ")
    value = lambda name: held[name] if name in held else int(name, 0) & 0xFFFFFFFF
    single = lambda word: np.array([word], np.uint32).view(np.float32)[0]
    byte = lambda word: int(np.clip(np.array([word], np.uint32).view(np.int32)[0], -128, 127)) & 0xFF
    pair = lambda word: np.array([word], np.uint32).view(ml_dtypes.bfloat16).astype(np.float64)
    for line in filter(None, map(str.strip, body.split(";"))):
        operation, _, rest = line.partition(" ")
        target, *names = (name.strip() for name in rest.split(","))
        if operation == "ld.shared.b32":
            held[target] = int(memory[value(names[0].strip("[]"))]) & 0xFFFFFFFF
            continue
        a, *more = map(value, names)
        match operation:
            case "mov.b32":
                found = a
            case "shr.u32":
                found = a >> more[0]
            case "shl.b32":
                found = a << more[0]
            case "and.b32":
                found = a & more[0]
            case "bfe.u32":
                found = (a >> more[0]) & (2 ** more[1] - 1)
            case "mad.lo.u32":
                found = a * more[0] + more[1]
            case "lop3.b32":
                b, c, table = more
                bits = [table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32)]
                found = sum(bit << i for i, bit in enumerate(bits))
            case "prmt.b32":
                b, select = more
                either = (b << 32 | a).to_bytes(8, "little")
                found = int.from_bytes(bytes(either[select >> 4 * i & 7] for i in range(4)), "little")
            case "max.NaN.bf16x2":
                found = int(np.maximum(pair(a), pair(more[0])).astype(ml_dtypes.bfloat16).view(np.uint32)[0])
            case "max.NaN.f32":
                found = int(np.maximum(single(a), single(more[0])).view(np.uint32))
            case "mul.rn.f32":
                found = int((single(a) * single(more[0])).view(np.uint32))
            case "neg.f32":
                found = a ^ 0x80000000
            case "fma.rn.f32":  # a product of float32 is exact in float64
                exact = np.float64(single(a)) * np.float64(single(more[0])) + np.float64(single(more[1]))
                found = int(np.float32(exact).view(np.uint32))
            case "cvt.rni.s32.f32":
                found = int(np.rint(single(a)))
            case "cvt.pack.sat.s8.s32.b32":
                found = (more[1] & 0xFFFF) << 16 | byte(a) << 8 | byte(more[0])
            case "sub.rn.bf16x2" | "fma.rn.bf16x2":
                exact = pair(a) - pair(more[0]) if operation[0] == "s" else pair(a) * pair(more[0]) + pair(more[1])
                found = int(exact.astype(ml_dtypes.bfloat16).view(np.uint32)[0])
        held[target] = found & 0xFFFFFFFF
    return held["$0"]


@pytest.fixture
def emulated(monkeypatch):
    """Decoders work on integers, and read a table that lies in the memory given here."""
    memory = {}
    assemble = lambda text, *operands: emulate(text, *operands, memory=memory)
    monkeypatch.setattr(compat, "mosaic_lanes", lambda: types.SimpleNamespace(assemble=assemble))
    return memory


def tile(bits, table, seed=0):
    """Codes of a tile, and the words of each thread."""
    low, high = (0, 2**bits) if table else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    codes = np.random.default_rng(seed).integers(low, high, (128, 64)).astype(np.int8)
    stored = fragments.store(codes, bits, table)[0, 0].reshape(-1, 128, 4)
    return codes, [stored[:, thread].reshape(-1) for thread in range(128)]


def places(thread, register):
    """Column and first row of a register of two values: the figure of the PTX manual, for matrix A of 16 rows."""
    warp, group, quarter = thread // 32, thread % 32 // 4, thread % 4
    block, number = divmod(register, 4)
    return 16 * warp + group + 8 * (number in (1, 3)), 16 * block + 2 * quarter + 8 * (number in (2, 3))


THREADS = (0, 5, 38, 127)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_registers_hold_the_values_that_the_tensor_cores_want(bits, emulated):
    codes, held = tile(bits, table=False)
    for thread in THREADS:
        found = registers._to_bfloat16(bits)([int(word) for word in held[thread]])
        assert len(found) == 32
        for register, word in enumerate(found):
            column, row = places(thread, register)
            values = np.array([word], np.uint32).view(ml_dtypes.bfloat16).astype(np.float64)
            np.testing.assert_array_equal(values, codes[row : row + 2, column])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_registers_of_integers_go_with_permuted_activations(bits, emulated):
    """Register r of four bytes: column and rows of the manual's matrix A of 32 rows, in the order of `permute_rows`."""
    codes, held = tile(bits, table=False)
    rows = np.asarray(fragments.permute_rows(jnp.arange(128)[None], bits))[0]
    assert sorted(rows) == list(range(128))
    for thread in THREADS:
        found = registers._to_int8(bits)([int(word) for word in held[thread]])
        assert len(found) == 16
        for register, word in enumerate(found):
            column = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 2)
            first = 16 * (register // 2) + 4 * (thread % 4)
            values = np.array([word], np.uint32).view(np.int8).astype(int)
            np.testing.assert_array_equal(
                values, codes[rows[first : first + 4], column].astype(int) * registers.over(bits)
            )


def test_values_of_a_table_are_looked_up_in_pairs(emulated):
    codes, held = tile(4, table=True)
    lane = 7
    address = LANE_TABLE + 4 * lane
    for byte, row in enumerate(registers.pairs(NF4)):
        emulated[address + 128 * byte] = row[lane]
    values = np.asarray(NF4, ml_dtypes.bfloat16).astype(np.float64)
    for thread in THREADS:
        found = registers._looked_up([int(word) for word in held[thread]], address)
        for register, word in enumerate(found):
            column, row = places(thread, register)
            pair = np.array([word], np.uint32).view(ml_dtypes.bfloat16).astype(np.float64)
            np.testing.assert_array_equal(pair, values[codes[row : row + 2, column]])


def words_of(array):
    return [int(word) for word in np.asarray(array).view(np.uint32).reshape(-1)]


def divisor(scale, lift=1.0):
    """What `in_order` divides by, as words."""
    step = np.float32(scale) * np.float32(lift)
    return words_of(np.array([lift, step, np.float32(1) / step], np.float32))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_activations_are_rounded_into_the_order_of_rows(bits, emulated):
    """As a thread does it, with blocks of its own; the largest of all threads is the scale of the token."""
    x = jax.random.normal(jax.random.key(0), (1, 128), jnp.bfloat16).at[0, 70].set(-5.5)
    codes, scale = quantize_tokens(x)
    want = np.asarray(fragments.permute_rows(codes, bits))
    words = words_of(x)
    most = hopper_round.largest_of(words)
    assert np.array([most], np.uint32).view(np.float32)[0] == 5.5 == float(scale[0, 0] * 127)
    block = hopper_round.block_rows(bits) // 2
    by = divisor(scale[0, 0])
    found = [word for i in range(0, 64, block) for word in hopper_round.in_order(words[i : i + block], *by)]
    np.testing.assert_array_equal(np.array(found, np.uint32).view(np.int8)[None], want)
    assert not np.array_equal(want, codes)


def test_rounding_agrees_with_a_division(emulated):
    """At halves and beside them, where a quotient that is off by its last bit rounds to another integer; and tiny ones.

    Every value of a step that a bfloat16 of magnitude 127 steps and less can be, by the same instructions on arrays.
    """
    rng = np.random.default_rng(0)
    steps = (rng.integers(2**23, 2**24, 400).astype(np.float32) * np.float32(2.0**-30))[:, None]
    halves = ((rng.integers(0, 254, (400, 2000)) + 1) / 2 * steps).astype(ml_dtypes.bfloat16).astype(np.float32)
    inverse = np.float32(1) / steps
    first = halves * inverse
    rest = (halves.astype(np.float64) - first.astype(np.float64) * steps).astype(np.float32)
    better = (first + rest.astype(np.float64) * inverse).astype(np.float32)
    np.testing.assert_array_equal(np.rint(better), np.rint(halves / steps))
    tiny = jnp.array([[1.0, -0.5, 0.25, 0.003] * 4], jnp.bfloat16) * jnp.bfloat16(2.0**-110)
    codes, scale = quantize_tokens(tiny)
    found = hopper_round.in_order(words_of(tiny), *divisor(scale[0, 0], 2.0**64))
    want = np.asarray(fragments.permute_rows(codes, 4))
    np.testing.assert_array_equal(np.array(found, np.uint32).view(np.int8)[None], want)


def test_which_activations_are_rounded_in_one_pass():
    assert hopper_round.fits((1, 3, 8192), jnp.bfloat16, 4)
    assert hopper_round.fits((1, 3, 48), jnp.bfloat16, 4)
    for shape, dtype, bits in (
        ((1, 3, 48), "bfloat16", 2),
        ((1, 3, 128), "float32", 4),
        ((1, 3, 65536), "bfloat16", 8),
    ):
        assert not hopper_round.fits(shape, dtype, bits)


@pytest.mark.parametrize(("bits", "table"), [(8, False), (4, False), (2, False), (4, True)])
def test_the_order_has_an_inverse(bits, table):
    codes = np.random.default_rng(1).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (2, 256, 192)).astype(np.int8)
    stored = fragments.store(codes, bits, table)
    assert (stored.shape, stored.dtype) == ((2, 2, 3, 2 * bits, 128), np.int32)
    np.testing.assert_array_equal(fragments.load(stored, bits, table), codes)
    np.testing.assert_array_equal(jax.jit(fragments.load, static_argnums=(1, 2))(stored, bits, table), codes)


@pytest.mark.parametrize(
    ("steps", "strips", "blocks"), [(32, 32, 132), (16, 16, 132), (1, 5, 5), (7, 3, 4), (64, 1, 3), (4, 6, 3)]
)
def test_steps_are_shared_out(steps, strips, blocks):
    shares = Shares(steps, strips, blocks)
    bounds = [int(shares.begin(block)) for block in range(blocks + 1)]
    assert (bounds[0], bounds[-1]) == (0, steps * strips)
    sizes = np.diff(bounds)
    assert sizes.max() - sizes.min() <= 1 <= sizes.min()
    owners = np.repeat(np.arange(blocks), sizes)
    assert [int(shares.owner(step)) for step in range(steps * strips)] == owners.tolist()
    most = 0
    for strip in range(strips):
        of_strip = list(dict.fromkeys(owners[strip * steps : (strip + 1) * steps].tolist()))
        assert of_strip == list(range(of_strip[0], shares.last(strip) + 1))
        most = max(most, len(of_strip))
    assert shares.split is (most > 1)


@pytest.mark.parametrize("warpgroups", [1, 2, 3, 4])
def test_threads_do_not_wait_for_registers_that_nobody_has(warpgroups):
    launched = min(248, 65536 // (128 * (warpgroups + 1)) // 8 * 8) * (warpgroups + 1)
    assert launched >= warpgroups * hopper_kernel.most_registers(warpgroups) + hopper_kernel.COPYING
    assert hopper_kernel.most_registers(warpgroups) >= 96


@pytest.mark.parametrize("case", DECODE[::3], ids=str)
def test_configs_fit(case):
    x, packed = jax.eval_shape(lambda: fill(case, 0))
    problem = describe(x, packed, case.activation_bits)
    found = hopper.candidates(problem)
    assert found[0] == hopper.tiles(problem)
    assert len(set(found)) == len(found) >= 2
    for config in found:
        assert hopper.legal(problem, config)
        assert not hopper.legal(problem, (*config[:3], 4096, config[4]))
    assert not hopper.legal(problem, ())


def test_a_weight_made_on_the_device_is_one():
    case = Case(2, 256, 128, 4, 128)
    x, packed = fill(case, 3)
    assert x.shape == (2, 256)
    codes = fragments.load(np.asarray(packed.codes), 4)
    assert (codes.min(), codes.max()) == (-8, 7)
    assert not np.array_equal(packed.codes, fill(case, 4)[1].codes)


INTERPRETED = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
from kernels_pallas import BACKENDS, compat, hopper, hopper_kernel
from kernels_pallas.cases import Case, draw

hopper.PROCESSORS = 3
config, broken = json.loads(sys.argv[1]), sys.argv[3:]
fields = json.loads(sys.argv[2])
case = Case(**{**fields, "batch": tuple(fields.get("batch", ()))})
if broken == ["hasty"]:
    real = compat.mosaic_gpu()
    class Hasty:
        barrier_wait = staticmethod(lambda barrier: None)
        def __getattr__(self, name):
            return getattr(real, name)
    hopper_kernel.compat = type("compat", (), {**vars(compat), "mosaic_gpu": staticmethod(Hasty)})
x, packed, _ = draw(case, "hopper", 0, exact=True)
run = lambda x, packed: BACKENDS["hopper"](x, packed, case.activation_bits, config=tuple(config), interpret=True)
match broken:
    case ["swapped nibbles"]:
        codes = packed.codes.view(jnp.uint32)
        swapped = (codes & 0x0F0F0F0F) << 4 | (codes >> 4) & 0x0F0F0F0F
        packed = dataclasses.replace(packed, codes=swapped.view(jnp.int32))
    case ["wrong scale row"]:
        packed = dataclasses.replace(packed, scales=jnp.roll(packed.scales, 1, axis=-2))
if broken == ["sixteen bits"]:
    group = jnp.arange(case.k) // case.group_size
    parts = [run(jnp.where(group == g, x, 0), packed) for g in range(case.k // case.group_size)]
    got = sum(part.astype(jnp.bfloat16).astype(jnp.float32) for part in parts)
else:
    got = run(x, packed)
x, plain, _ = draw(case, "plain", 0, exact=True)
one = lambda x, packed: BACKENDS["reference"](x, packed, case.activation_bits)
want = np.asarray((jax.vmap(one) if case.batch else one)(x, plain))
error = float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())
print(json.dumps({"error": error, "races": bool(compat.gpu_races_found())}))
"""


def interpreted(root, config, case, *more):
    environment = {**os.environ, "NPROC": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", INTERPRETED, json.dumps(config), json.dumps(case), *more]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(found.stdout.splitlines()[-1])


SMALL = {"m": 1, "k": 384, "n": 128, "bits": 4, "group_size": 128}
SHAPES = [
    ([2, 1, 8, 2, 1], SMALL, 0),
    *(
        pytest.param(config, case, allowed, marks=pytest.mark.slow)
        for config, case, allowed in (
            ([2, 2, 8, 2, 1], {"m": 9, "k": 512, "n": 256, "bits": 4, "group_size": 128}, 0),
            ([1, 2, 8, 2, 1], {"m": 3, "k": 512, "n": 128, "bits": 8, "activation_bits": 8}, 0),
            ([1, 1, 8, 2, 1], {"m": 3, "k": 384, "n": 128, "bits": 4, "group_size": 128, "nf4": True}, 2**-9),
            ([1, 2, 8, 2, 1], {"m": 3, "k": 256, "n": 128, "bits": 2, "group_size": 256}, 0),
            ([2, 1, 16, 4, 1], {"m": 20, "k": 512, "n": 128, "bits": 4, "activation_bits": 8}, 0),
            ([2, 2, 8, 2, 1], {"m": 3, "k": 500, "n": 120, "bits": 4, "group_size": 64}, 0),
            ([1, 1, 8, 2, 1], {"m": 3, "k": 130, "n": 64, "bits": 2, "group_size": 32}, 0),
            ([2, 1, 8, 2, 1], {"m": 3, "k": 256, "n": 128, "bits": 4, "group_size": 32, "activation_bits": 8}, 0),
            ([2, 1, 8, 2, 1], {"m": 2, "k": 384, "n": 128, "bits": 4, "group_size": 128, "batch": [3]}, 0),
            ([2, 1, 8, 2, 1], {"m": 2, "k": 256, "n": 128, "bits": 8, "zeros": True, "activation_bits": 8}, 0),
        )
    ),
]


@pytest.mark.parametrize(("config", "case", "allowed"), SHAPES)
def test_the_kernel_equals_the_contract_when_interpreted(root, config, case, allowed):
    """With several blocks to a strip and tokens in batches. Values of a table are rounded to bfloat16, no others."""
    found = interpreted(root, config, case)
    assert found["error"] <= allowed
    assert not found["races"]


def test_a_kernel_that_waits_for_nothing_races(root):
    assert interpreted(root, [1, 1, 8, 2, 1], {**SMALL, "k": 256}, "hasty")["races"]


@pytest.mark.parametrize("mutant", ["swapped nibbles", "wrong scale row", "sixteen bits"])
def test_broken_weights_and_sums_are_found(root, mutant):
    """What `tests/conformance` asks of the other backends: the check that a sound kernel passes fails."""
    assert interpreted(root, [2, 1, 8, 2, 1], SMALL, mutant)["error"] > 0


def test_other_gpus_are_told_from_hopper(monkeypatch):
    for kind, is_one in (
        ("NVIDIA H200", True),
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA GH200 480GB", True),
        ("cuda", True),
    ):
        monkeypatch.setattr(compat, "device_kind", lambda of, kind=kind: kind)
        assert compat.hopper() is is_one
    monkeypatch.setattr(compat, "device_kind", lambda of: "NVIDIA A100-SXM4-40GB")
    assert not compat.hopper()
    problem = describe(*fill(Case(1, 128, 128, 4), 0), None)
    assert hopper.HOPPER.refuses(problem) == "it runs on NVIDIA's Hopper, not on NVIDIA A100-SXM4-40GB"


def test_sums_of_more_products_than_fit_are_refused():
    """127 * 128 * 132,104 is below 2^31, and once more it is not."""
    assert registers.too_long(132_104) is None
    case = Case(1, 132_105, 128, 4, activation_bits=8)
    problem = describe(jax.ShapeDtypeStruct((1, case.k), jnp.bfloat16), shapes(case, "hopper")[1], 8)
    for name in ("hopper", "dense"):
        assert BACKENDS[name].refuses(problem) == "it adds up 132105 rows in one integer, allowed are 132104"


def test_a_gpu_is_timed_by_its_kernels(monkeypatch):
    """Calls of two kernels each; what the library gives is milliseconds of kernels in their order."""
    calls = []
    library = types.SimpleNamespace(
        _cupti_init=lambda: None, _cupti_get_timings=lambda finalize: [("a", 0.001 * i) for i in range(1, 7)]
    )
    profiler = types.SimpleNamespace(mosaic_gpu_lib=types.SimpleNamespace(_mosaic_gpu_ext=library))
    monkeypatch.setattr(compat.importlib, "import_module", lambda name: profiler)
    monkeypatch.setattr(compat, "platform", lambda: "cuda")
    found = timers.times({"one": lambda: calls.append(0)}, 3)
    np.testing.assert_allclose(found["one"], [3, 7, 11])
    assert len(calls) == 1 + 3
