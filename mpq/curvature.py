"""Products with curvature matrices, and estimates of their traces: pure functions that know no layers and no bits.

Notation: f(theta) is a scalar loss, z(theta) the outputs it is computed from, theta a pytree of arrays, v one of equal
structure.

    Hessian        H v = d/de grad f(theta + e v) at e = 0        Pearlmutter 1994, Neural Computation 6(1)
    Gauss-Newton   G v = J^T (d^2 loss / dz^2) J v, J = dz/dtheta   Schraudolph 2002, Neural Computation 14(7)
    Hutchinson     E[v^T H v] = tr(H) for E[v v^T] = I            Hutchinson 1989, Comm. Stat. Simul. 18(3)
    Hutch++        tr(Q^T H Q) + tr of the rest by Hutchinson     Meyer et al. 2021, arXiv:2010.09649, algorithm 1

For a softmax output with cross-entropy, d^2 loss / dz^2 = diag(p) - p p^T does not depend on the label, and G is the
type-II Fisher matrix (Martens 2020, JMLR 21(146)), which is also the Hessian of KL(p_theta || p_theta') in theta' at
theta' = theta.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

Tree = TypeVar("Tree")
Result = TypeVar("Result")


def hvp(loss: Callable[[Tree, Any], jax.Array], weights: Tree, batch: Any, v: Tree) -> Tree:
    """Hessian-vector product, forward over reverse: about the cost of two gradients, and their memory.

    Args:
      loss: `(weights, batch) -> scalar`.
      weights: where the Hessian is taken.
      batch: passed on to `loss`.
      v: same structure and shapes as `weights`.

    Returns:
      H v, same structure.
    """
    return jax.jvp(lambda w: jax.grad(loss)(w, batch), (weights,), (v,))[1]


def ggn_vp(logits_fn: Callable[[Tree, Any], jax.Array], weights: Tree, batch: Any, v: Tree) -> Tree:
    """Gauss-Newton-vector product of the softmax cross-entropy, summed over all positions.

    J^T (diag(p) - p p^T) J v per position: one forward-mode and one reverse-mode pass. It equals the type-II Fisher
    product, is positive semi-definite, and needs no labels.

    Args:
      logits_fn: `(weights, batch) -> [..., classes]`; leading axes are positions.
      weights: where the matrix is taken.
      batch: passed on to `logits_fn`.
      v: same structure and shapes as `weights`.

    Returns:
      G v, same structure.
    """
    logits, pullback = jax.vjp(lambda w: logits_fn(w, batch), weights)
    tangent = jax.jvp(lambda w: logits_fn(w, batch), (weights,), (v,))[1]
    p = jax.nn.softmax(logits, axis=-1)
    return pullback(p * (tangent - jnp.sum(p * tangent, axis=-1, keepdims=True)))[0]


def second_derivative(function: Callable[[Tree], Result], at: Tree, direction: Tree) -> Result:
    """d^2/de^2 function(at + e direction) at e = 0, forward over forward: no backward pass, and any shape of result.

    Of a loss it is v^T H v. Where the result is a vector of losses, such as one a window, a form for each comes out.

    Args:
      function: of one pytree.
      at: where.
      direction: same structure and shapes as `at`.

    Returns:
      What `function` returns, differentiated twice.
    """
    slope = lambda x: jax.jvp(function, (x,), (direction,))[1]
    return jax.jvp(slope, (at,), (direction,))[1]


def rademacher_like(key: jax.Array, tree: Tree) -> Tree:
    """Independent signs (+1 or -1, each with probability 1/2) in the shapes and dtypes of `tree`.

    The signs of a leaf depend on `key` and on the leaf's path alone: adding, removing or reordering others does not
    move them.
    """

    def draw(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jax.random.rademacher(
            jax.random.fold_in(key, stable_id(jax.tree_util.keystr(path))), leaf.shape, leaf.dtype
        )

    return jax.tree_util.tree_map_with_path(draw, tree)


def trace_sample(loss: Callable[[Tree, Any], jax.Array], weights: Tree, batch: Any, v: Tree) -> Tree:
    """One Hutchinson sample of tr(H_l) for every leaf l at once: v_l^T (H v)_l.

    The expectation over v is tr(H_l) for every leaf, because the cross terms v_l^T H_lj v_j have mean zero. They add
    variance: of one sample Var = 2 (||H_ll||_F^2 - ||diag H_ll||^2) + sum_{j != l} ||H_lj||_F^2 for Rademacher v.

    Args:
      loss: `(weights, batch) -> scalar`.
      weights: where the Hessian is taken.
      batch: passed on to `loss`.
      v: a probe, from `rademacher_like`.

    Returns:
      A scalar per leaf, same structure.
    """
    return jax.tree.map(lambda a, b: jnp.sum(a * b), v, hvp(loss, weights, batch, v))


def hutch_plus_plus(product: Callable[[Tree], Tree], like: Tree, key: jax.Array, rank: int) -> tuple[Any, Any]:
    """Trace of one symmetric matrix H by Hutch++: what H does most is taken exactly, the rest by Hutchinson.

    Q is an orthonormal basis of H S for `rank` random sign vectors S; with P = I - Q Q^T and sign vectors g,

        tr(H) = tr(Q^T H Q) + tr(P H P)  ~=  tr(Q^T H Q) + mean over g of (P g)^T H (P g)

    Unbiased for every Q. Hutchinson needs 1/epsilon^2 products for a relative error epsilon of a semi-definite matrix,
    this 1/epsilon; it is exact where the rank of H is at most `rank`. It serves one matrix at a time: with probes over
    all weights at once, as `trace_sample` has them, the cross terms of tr(Q^T H Q) would have no mean zero.

    Args:
      product: v -> H v.
      like: gives the structure, shapes and dtype of v.
      key: of S and g.
      rank: columns of S, and probes g; at most the number of elements. 3 `rank` products are taken, and 2 `rank`
        vectors kept.

    Returns:
      `(trace, stderr)`; the standard error is over the probes of the rest, NaN for one probe.
    """
    flat, unravel = ravel_pytree(like)
    products = lambda columns: jax.lax.map(lambda v: ravel_pytree(product(unravel(v)))[0], columns.T).T
    signs = lambda i: jax.random.rademacher(jax.random.fold_in(key, i), (flat.size, rank), flat.dtype)
    q = jnp.linalg.qr(products(signs(0)))[0]
    g = signs(1)
    rest = g - q @ (q.T @ g)
    samples = jnp.sum(rest * products(rest), axis=0)
    spread = jnp.std(samples, ddof=1) if rank > 1 else jnp.nan
    return jnp.sum(q * products(q)) + samples.mean(), spread / rank**0.5


def stable_id(text: str) -> int:
    """31-bit FNV-1a hash: equal in every process and version, unlike `hash`."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value & 0x7FFFFFFF
