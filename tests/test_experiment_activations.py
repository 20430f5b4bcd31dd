"""`experiments.activations` on a tiny model."""

import dataclasses

import pytest

from analysis.activations import page
from experiments import activations
from experiments.activations import SETTINGS, Options
from mpq.activations import parse_activation_scheme
from mpq.activations.plans import split_plan
from mpq.files import read_json
from mpq.formats import parse_scheme
from mpq.quantize import QUANTIZERS
from mpq.types import MpqError
from tests import tiny

CHOSEN = ("W8", "W8A8 dynamic", "W8A8 static, absmax", "W8g32A8 static, zero point, smoothed", "W8A8KV4 dynamic")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    root = tmp_path_factory.mktemp("activations")
    texts = tiny.model_and_texts(root)
    sizes = {"windows": 8, "window": 16, "batch_size": 4}
    return Options(**texts, shifted=texts["data"], out=root / "tiny.json", settings=CHOSEN, **sizes)


def test_there_is_a_row_for_each_setting(options: Options) -> None:
    activations.main(dataclasses.replace(options, settings=CHOSEN[:1]))
    first = read_json(options.out, "results")["rows"]
    activations.main(options)
    result = read_json(options.out, "results")
    assert result["rows"][:1] == first  # not computed again
    rows = {row["setting"]: row["test"] for row in result["rows"]}
    assert tuple(rows) == CHOSEN
    assert 0 < rows["W8"]["kl"] < rows["W8A8 dynamic"]["kl"] < rows["W8A8KV4 dynamic"]["kl"]
    assert rows["W8"]["kl"] < rows["W8A8 static, absmax"]["kl"]
    assert rows["W8"]["kl"] < rows["W8g32A8 static, zero point, smoothed"]["kl"] < rows["W8A8KV4 dynamic"]["kl"]
    change = 100 * (rows["W8"]["perplexity"] / result["perplexity"]["test"] - 1)
    assert rows["W8"]["change_percent"] == pytest.approx(change)
    written = page([result])
    assert "| W8A8 dynamic (`int8_channel+int8_token`) | " in written
    assert f"| {rows['W8']['change_percent']:+.2f} % |" in written
    assert set(result["record"]["inputs"]) == {"data", "model", "test", "shifted"}


def test_every_setting_names_schemes_and_an_algorithm() -> None:
    for plan, method, *_ in SETTINGS.values():
        weights, *rows = split_plan(plan)
        parse_scheme(weights)
        for text in filter(None, rows):
            parse_activation_scheme(text)
        assert method in QUANTIZERS


def test_an_unknown_setting_and_an_empty_choice_are_refused(options: Options) -> None:
    with pytest.raises(MpqError, match=r"^unknown setting 'W1': the valid ones are W8, W8A8 dynamic, "):
        activations.main(dataclasses.replace(options, settings=("W1",)))
    with pytest.raises(MpqError, match=r"^no weight matches 'nothing': name some of embed_tokens.embedding \.\.\.$"):
        activations.main(dataclasses.replace(options, only="nothing"))
