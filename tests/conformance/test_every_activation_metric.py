"""Every activation metric keeps the laws of its kind, of activations and of the KV cache."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.activations import ACTIVATION_METRICS, save_activation_table
from mpq.data.dataset import new_dataset
from mpq.sensitivity import MemoryStore
from mpq.types import MpqError
from tests.activation_cases import SCHEMES, SHAPES, TIME, VOCAB, WIDTH, forward, make_data, make_model, rows_of, run

EVERY_METRIC = pytest.mark.parametrize("metric", ACTIVATION_METRICS.values(), ids=ACTIVATION_METRICS.keys())


def assert_equal_up_to_rounding(got, want):
    """float32 sums in another order: 1e-6 of logits of order 1 that KL weighs at first order."""
    np.testing.assert_allclose(got.loss_increase, want.loss_increase, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(got.stderr, want.stderr, rtol=2e-3, atol=1e-6)


@EVERY_METRIC
@pytest.mark.parametrize("of", ["activations", "kv"])
class TestEveryMetric:
    def test_fills_the_table(self, metric, of):
        model, data = make_model(), make_data(10)
        table = run(metric, of, model, data)
        assert ACTIVATION_METRICS[metric.name] is metric
        assert table.activations == rows_of(of, model)
        assert table.schemes == SCHEMES[of]
        assert table.metric.startswith(metric.name)
        assert (table.quantizer, table.model_digest, table.data_digest) == ("dynamic", model.digest, data.digest)
        assert (table.loss_increase > 0).all()
        assert (table.stderr > 0).all()

    def test_does_not_depend_on_the_batch_size(self, metric, of):
        model, data = make_model(), make_data(10)
        assert_equal_up_to_rounding(*(run(metric, of, model, data, batch_size=size) for size in (4, 3)))

    def test_padding_never_counts(self, metric, of):
        model, data = make_model(), make_data(10)
        poisoned = dataclasses.replace(data, inputs=np.where(data.mask, data.inputs, VOCAB - 1 - data.inputs))
        assert_equal_up_to_rounding(*(run(metric, of, model, d) for d in (data, poisoned)))

    def test_interrupted_gives_the_bytes_of_uninterrupted(self, metric, of, tmp_path):
        class Killed(MemoryStore):
            def put(self, key, value):
                super().put(key, value)
                if len(self.values) == 2:
                    raise KeyboardInterrupt

        class Closed(MemoryStore):
            def put(self, key, value):
                raise AssertionError(f"{key} was computed again")

        model, data, store = make_model(), make_data(10), Killed()
        save_activation_table(tmp_path / "whole", run(metric, of, model, data))
        with pytest.raises(KeyboardInterrupt):
            run(metric, of, model, data, store=store)
        save_activation_table(tmp_path / "resumed", run(metric, of, model, data, store=store))
        assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
        finished = Closed()
        finished.values = store.values
        run(metric, of, model, data, store=finished)

    @pytest.mark.parametrize("what", ["model", "data", "key", "batch_size", "rows", "schemes", "metric"])
    def test_what_a_store_holds_is_what_would_be_computed(self, metric, of, what):
        """With another input, either an item is asked for that the usual run did not leave, or it changes none."""

        class Asked(BaseException):
            pass

        class Usual(MemoryStore):
            def get(self, key):
                if key not in self.values:
                    raise Asked
                return self.values[key]

        model, data, store = make_model(), make_data(10), Usual()
        kept = MemoryStore()
        run(metric, of, model, data, store=kept)
        store.values = kept.values
        options = {f.name: 2 * getattr(metric, f.name) for f in dataclasses.fields(metric)}
        usual = {"metric": metric, "model": model, "data": data}
        other = {
            "model": lambda: dataclasses.replace(model, params=model.params | {"up": model.params["up"] * 1.5}),
            "data": lambda: new_dataset(data.inputs[:, ::-1].copy(), data.mask, data.document, "noise"),
            "key": lambda: 6,
            "batch_size": lambda: 3,
            "rows": lambda: rows_of(of, model)[::-1],
            "schemes": lambda: SCHEMES[of][1:],
            "metric": lambda: dataclasses.replace(metric, **options),
        }
        given = usual | {what: other[what]()}
        extra = {name: value for name, value in given.items() if name not in usual}
        call = lambda s: run(given["metric"], of, given["model"], given["data"], store=s, **extra)
        try:
            found = call(store)
        except Asked:
            return
        made = call(None)
        np.testing.assert_array_equal(found.loss_increase, made.loss_increase)
        np.testing.assert_array_equal(found.stderr, made.stderr)

    def test_what_is_not_finite_or_does_not_count_is_named(self, metric, of):
        model, data = make_model(), make_data(10)
        with pytest.raises(MpqError, match="noise has no token that counts"):
            run(metric, of, model, dataclasses.replace(data, mask=np.zeros_like(data.mask)))
        broken = dataclasses.replace(model, params=model.params | {"up": model.params["up"].at[1, 2].set(jnp.nan)})
        with pytest.raises(MpqError, match="weight up holds NaN or infinity"):
            run(metric, of, broken, data, rows=rows_of(of, model))
        failing = make_model(lambda p, tokens: forward(p, tokens) * jnp.inf)
        with pytest.raises(MpqError, match="the model gives NaN or infinite outputs on noise"):
            run(metric, of, failing, data)


@EVERY_METRIC
def test_windows_that_share_a_read_are_told_apart(metric):
    """Single windows share nothing with others: what they give is right."""

    def shared(p, tokens):
        h = p["embed"][tokens] + jnp.eye(tokens.shape[1], TIME) @ p["place"]
        return jnp.tanh(h @ p["up"]) @ p["down"] @ p["head"]

    model = make_model(shared, (*SHAPES.items(), ("place", (TIME, WIDTH))))
    table = lambda size: run(metric, "activations", model, make_data(10), batch_size=size)
    assert "place" in [row.path for row in table(1).activations]
    assert_equal_up_to_rounding(table(4), table(1))
