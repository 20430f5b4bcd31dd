"""The digest of a traced function tells functions apart by what they compute, and by nothing else."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mpq.trace import trace

W = {"w": jnp.ones((3, 3))}
INPUTS = jnp.ones((2, 3))
TABLE = np.arange(3, dtype=np.float32)


def body(x, w, table):
    return jnp.tanh(x @ w) * table


def digest(fn, inputs=INPUTS):
    return trace(fn, W, inputs).digest


def test_equal_computations_of_other_functions_are_equal():
    def renamed(params, given):
        return body(given, params["w"], TABLE)

    assert digest(renamed) == digest(lambda p, x: body(x, p["w"], TABLE.copy()))


def test_operations_shapes_and_constants_count_also_inside_jit_and_scan():
    inner = lambda table: jax.jit(lambda x, w: body(x, w, table))
    scanned = lambda table: lambda p, x: jax.lax.scan(lambda c, _: (inner(table)(c, p["w"]), None), x, length=2)[0]
    functions = [
        lambda p, x: body(x, p["w"], TABLE),
        lambda p, x: body(x, p["w"], TABLE + 1),
        lambda p, x: body(x, p["w"], 2.0),
        lambda p, x: body(x, p["w"], 3.0),
        lambda p, x: jnp.sin(x @ p["w"]) * TABLE,
        lambda p, x: inner(TABLE)(x, p["w"]),
        lambda p, x: inner(TABLE + 1)(x, p["w"]),
        scanned(TABLE),
        scanned(TABLE + 1),
    ]
    digests = [*map(digest, functions), digest(functions[0], jnp.ones((4, 3)))]
    assert len(set(digests)) == len(digests)


def test_a_random_key_among_the_constants_counts():
    noisy = lambda key: lambda p, x: body(x, p["w"], 1.0) + jax.random.normal(key, x.shape)
    keys = map(jax.random.key, (0, 1, 0))
    first, other, same = (digest(noisy(key)) for key in keys)
    assert first == same != other


def test_addresses_do_not_count():
    def callback(number):
        return lambda p, x: jax.pure_callback(lambda a: a + number, x, x @ p["w"])

    assert digest(callback(0)) == digest(callback(0))


def test_it_is_the_same_in_another_process():
    program = (
        "import jax.numpy as jnp; from mpq.trace import trace;"
        "print(trace(lambda p, x: jnp.tanh(x) * p['w'][0], {'w': jnp.ones((3, 3))}, jnp.ones((2, 3))).digest)"
    )
    got = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert got == digest(lambda p, x: jnp.tanh(x) * p["w"][0])
