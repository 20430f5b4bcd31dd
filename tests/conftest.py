"""JAX as every test wants it, and what several test files share."""

import os
import tempfile
from pathlib import Path

# Read when JAX is imported. A run on an accelerator says so: JAX_PLATFORMS=cuda pytest -m gpu
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mpq.models import functional
from mpq.models.llama import Llama, LlamaConfig

jax.config.update("jax_default_matmul_precision", "highest")  # oracles compare in float32, never in TF32
jax.config.update("jax_numpy_dtype_promotion", "strict")  # no silent widening

# Kernels are compiled into the user's cache, and the tables that lie there go before those that are shipped: tests have
# a cache of their own, in the folder that pytest keeps. So have processes that they start.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "user")

# Many tests compile the same programs under other names. The folder is this process's alone: JAX writes entries in
# place, and a reader in another process could meet half of one. Processes that tests start have none.
_COMPILED = tempfile.TemporaryDirectory(prefix="mpq-tests-")
jax.config.update("jax_compilation_cache_dir", _COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

ROOT = Path(__file__).resolve().parent.parent

TINY = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="session")
def root():
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data():
    """Folder of real models and texts that lies beside the repository on some machines."""
    folder = Path(os.environ.get("MPQ_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no folder of shared models and texts; MPQ_SHARED_DATA can name one")
    return folder


@pytest.fixture(scope="session")
def tiny_llama():
    """`(apply, params)` of a random tied two-layer Llama: `apply(params, tokens int32[batch, time]) -> logits`.

    The matrices are drawn large enough (standard deviation k**-0.5) that logits vary and every layer matters.
    """
    apply, shapes = functional(nnx.eval_shape(lambda: Llama(TINY, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = {}
    for path, shape in shapes.items():
        noise = rng.normal(size=shape.shape)
        value = 1 + 0.1 * noise if path.endswith("scale") else noise / np.sqrt(shape.shape[0])
        params[path] = jnp.asarray(value, jnp.float32)
    params["embed_tokens.embedding"] *= np.sqrt(TINY.vocab_size / TINY.hidden_size)  # k is its second axis
    return apply, params


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled():
    """Give a file's compiled programs back: they stay on disk, and a process that keeps thousands slows down."""
    yield
    jax.clear_caches()
