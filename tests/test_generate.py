"""Text that a model writes itself: against decoding by whole windows, and in its distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.activations.apply import choose_activations, with_activations
from mpq.activations.rows import activation_rows
from mpq.activations.scheme import parse_activation_scheme
from mpq.data import new_dataset
from mpq.generate import PROMPT, can_write, write
from mpq.models.decoders import Slots
from tests import tiny
from tests.runtime_cases import made

KEY = jax.random.key(3)
DECODERS = ("llama", "gpt2", "gemma2", "opt, post-norm, projected", "qwen2_moe")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return tiny.loaded(tmp_path_factory.mktemp("generate") / "model", max_windows=6)


@pytest.mark.parametrize("name", DECODERS)
def test_token_by_token_every_decoder_computes_what_it_does_of_whole_windows(name, tmp_path):
    model = made(name, tmp_path / "model")
    assert model.decoder is not None
    config, (batch, length) = model.decoder, (2, 10)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)).astype(np.int32)
    shape = batch, length, config.num_key_value_heads, config.head_dim
    past = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_hidden_layers)]
    got = []
    for place in range(length):
        cache = Slots(jnp.int32(place), past, 5 if place < 5 else length)
        got.append(model.apply(model.params, tokens[:, place : place + 1], cache)[:, 0])
        past = cache.present
    want = np.asarray(model.apply(model.params, tokens))
    # The same products in sums of other orders: some tens of float32's last bits of the largest value.
    np.testing.assert_allclose(np.stack(got, 1), want, atol=64 * np.finfo(np.float32).eps * np.abs(want).max())


def test_windows_begin_as_those_given_do_and_go_on_as_the_model_says(setup):
    model, data = setup
    found = write(model, data, 400, key=KEY, batch_size=100)
    length = data.inputs.shape[1]
    assert found.inputs.shape == (400, length)
    assert found.inputs.dtype == data.inputs.dtype
    assert found.mask.all()
    shared = np.array([max(np.cumprod(row == given).sum() for given in data.inputs) for row in found.inputs])
    assert shared.min() >= 1
    assert np.median(shared) <= 1 + PROMPT * length
    # Mean surprise at the tokens written against the mean entropy there, a martingale: within four standard errors.
    written = np.arange(1, length) >= 1 + int(PROMPT * length)
    logp = np.asarray(jax.nn.log_softmax(model.apply(model.params, found.inputs)), np.float64)[:, :-1]
    surprise = -np.take_along_axis(logp, found.inputs[:, 1:, None], -1)[..., 0]
    excess = (surprise + (np.exp(logp) * logp).sum(-1))[:, written]
    assert abs(excess.mean()) < 4 * excess.std(ddof=1) / np.sqrt(excess.size)
    assert excess.std() > 0.1


def test_what_is_written_depends_on_key_and_number_alone(setup):
    model, data = setup
    all_at_once, few = write(model, data, 12, key=KEY), write(model, data, 7, key=KEY, batch_size=3)
    np.testing.assert_array_equal(few.inputs, all_at_once.inputs[:7])
    other = write(model, data, 12, key=jax.random.key(4))
    assert (other.inputs != all_at_once.inputs).mean() > 0.5
    assert len({row.tobytes() for row in all_at_once.inputs}) == 12


def test_padding_is_no_beginning(setup):
    model, data = setup
    mask = np.ones(data.inputs.shape, bool)
    mask[:, 2:] = False
    inputs = np.where(mask, data.inputs, -1)  # no token: it would be read as any other
    found = write(model, new_dataset(inputs, mask, data.document, "x"), 20, key=KEY)
    assert (found.inputs >= 0).all()


def test_only_decoders_as_they_are_loaded_can_write(setup, tmp_path):
    model, _ = setup
    assert can_write(model)
    assert not can_write(made("bert", tmp_path / "bert"))
    traced = model.trace(2, 16)
    rows = choose_activations(dict.fromkeys(activation_rows(traced), parse_activation_scheme("int8_token")), {})
    assert not can_write(with_activations(model, traced, rows))
    assert not can_write(dataclasses.replace(model, decoder=None))
