"""Operations that graphs of a runtime have no form for: each is named before anything is written."""

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import export, lax

from mpq.export.jaxprs import walk
from mpq.litert.activations import Rounded
from mpq.litert.call import open_dims
from tests.runtime_cases import message_of

pytestmark = pytest.mark.parity

IMAGE = jnp.zeros((1, 4, 4, 3))
CONV = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def gather(
    collapsed: tuple[int, ...], axes: tuple[int, ...], sizes: tuple[int, int]
) -> Callable[[jax.Array], jax.Array]:
    offset = tuple(range(1, 3 - len(collapsed)))  # what is no index of the five
    numbers = lax.GatherDimensionNumbers(offset, collapsed, axes)
    return lambda x: lax.gather(x[0, :, :, 0], jnp.zeros((5, len(axes)), jnp.int32), numbers, sizes)


CASES = {
    "choice": (
        lambda x: lax.select_n((x > 0).astype(jnp.int32) + 1, x, x, x),
        "a choice among more than two values has no form in {} here",
    ),
    "padding": (
        lambda x: lax.pad(x, 0.0, [(0, 0, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0)]),
        {
            "ONNX": "padding between elements has no form in ONNX",
            "PyTorch": "padding between elements, or by what is computed, has no form in PyTorch here",
            "LiteRT": "padding between elements, or less than none, has no form in LiteRT",
        },
    ),
    "parts of slices": (gather((0,), (0,), (1, 2)), "a gather of parts of slices has no form in {} here"),
    "slices of several rows": (gather((), (0,), (2, 4)), "a gather of parts of slices has no form in {} here"),
    "transposed convolution": (
        lambda x: lax.conv_general_dilated(x, jnp.ones((3, 3, 3, 2)), **CONV, lhs_dilation=(2, 2)),
        {
            "ONNX": "a transposed convolution has no form in ONNX here",
            "PyTorch": "a transposed convolution, or one of more than three dimensions, has no form in PyTorch here",
            "LiteRT": "a transposed convolution, or one of one or three dimensions, has no form in LiteRT here",
        },
    ),
    "padding of less than none": (
        lambda x: lax.pad(x, 0.0, [(0, 0, 0), (0, -1, 0), (0, 0, 0), (0, 0, 0)]),
        {"LiteRT": "padding between elements, or less than none, has no form in LiteRT"},
    ),
    "convolution of channels first": (
        lambda x: lax.conv_general_dilated(x, jnp.ones((2, 4, 3, 3)), (1, 1), "SAME"),
        {"LiteRT": "a convolution whose channels are not last has no form in LiteRT here"},
    ),
    "window over channels": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 1, 3), (1, 1, 1, 1), "VALID"),
        "a window over batch or channels has no form in {} here",
    ),
}


REFUSED = [
    (case, runtime)
    for case, (_, message) in CASES.items()
    for runtime in ("ONNX", "PyTorch", "LiteRT")
    if isinstance(message, str) or runtime in message
]


def converter(runtime: str):
    """Emits the equations of a graph, and what its input is called in it."""
    package = {"ONNX": "onnx", "PyTorch": "pt2", "LiteRT": "litert"}[runtime]
    graph, convert = (importlib.import_module(f"mpq.{package}.{part}") for part in ("graph", "convert"))
    if runtime == "ONNX":
        return convert.Converter(graph.Graph(graph.require_onnx()), {}, {}, {}), "x"
    if runtime == "LiteRT":
        made = graph.Graph()
        return convert.Converter(made, {}, {}, {}, Rounded({}, {})), made.tensor("x", IMAGE.shape, "float32")
    made = graph.Graph(graph.require_torch())
    return convert.Converter(made, {}, {}, {}), made.input("x")


@pytest.mark.parametrize(("case", "runtime"), REFUSED)
def test_it_is_named(case, runtime):
    function, message = CASES[case]
    message = message[runtime] if isinstance(message, dict) else message.format(runtime)
    closed = jax.make_jaxpr(function)(IMAGE)
    emitter, x = converter(runtime)
    assert message_of(lambda: walk(closed.jaxpr, closed.consts, [x], emitter._emit, folded=64)) == message


def test_a_shape_of_two_open_dimensions():
    message = "a shape ('a', '3', 'b') with two open dimensions has no form in LiteRT here"
    assert message_of(lambda: open_dims(export.symbolic_shape("a, 3, b"))) == message
