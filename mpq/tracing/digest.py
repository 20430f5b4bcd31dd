"""A digest of what a traced function computes, whatever it is called and wherever its code lies."""

import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

from mpq.files import digest_arrays, digest_json
from mpq.tracing.follow import opened

_ADDRESS = re.compile("0x[0-9a-f]+")


def jaxpr_digest(jaxpr: Any) -> str:
    """sha256 of a closed jaxpr: of its text, and of the arrays in it, which the text only names.

    Equal in every process for one version of JAX. Python functions that a jaxpr holds, as those of a callback or of a
    derivative rule, count by their names.
    """
    arrays = {str(number): array for number, array in enumerate(_arrays(jaxpr))}
    return digest_json([_ADDRESS.sub("", str(jaxpr)), digest_arrays(arrays)])


def _arrays(sub: Any) -> Iterator[Any]:
    """Constants and literals of a jaxpr and of those inside it, in the order of execution."""
    jaxpr, consts = opened(sub)
    for array in consts:
        is_key = jax.dtypes.issubdtype(getattr(array, "dtype", None), jax.dtypes.prng_key)
        yield jax.random.key_data(array) if is_key else array
    for eqn in jaxpr.eqns:
        yield from (operand.val for operand in eqn.invars if isinstance(operand, core.Literal))
        for value in jax.tree.leaves(eqn.params):
            if hasattr(opened(value)[0], "eqns"):
                yield from _arrays(value)
