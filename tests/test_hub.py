"""Where a model lies: folders, the hub with its revisions, and no network."""

import types

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from mpq.models import load, load_shapes
from mpq.models.hub import resolve
from mpq.types import MpqError
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository; the list of requests that it got."""
    folder = tiny.write_folder(tmp_path / "models--owner--name" / "snapshots" / COMMIT)
    requests = []

    def snapshot_download(name, **options):
        requests.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return requests


@pytest.mark.parametrize(("suffix", "revision"), [("", None), ("@main", "main"), (f"@{COMMIT}", COMMIT)])
def test_a_revision_is_asked_for_and_the_commit_is_the_models_name(hub, suffix, revision):
    model = load(f"owner/name{suffix}")
    assert [(name, options["revision"]) for name, options in hub] == [("owner/name", revision)]
    assert model.name == f"owner/name@{COMMIT}"
    assert load(model.name).digest == model.digest
    assert hub[-1][1]["revision"] == COMMIT


def test_weights_are_fetched_to_be_read_and_not_to_be_sized(hub):
    load("owner/name")
    load_shapes("owner/name")
    wanted = [set(options["allow_patterns"]) for _, options in hub]
    assert wanted == [{"*.json", "*.safetensors"}, {"*.json"}]
    assert "consolidated*" in hub[0][1]["ignore_patterns"]  # a second copy of the weights for another program


def test_without_a_network_what_was_downloaded_before_is_used(tmp_path, monkeypatch):
    cache = tmp_path / "models--owner--name"
    tiny.write_folder(cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for source in ("owner/name", "owner/name@main", f"owner/name@{COMMIT}"):
        assert load(source).name == f"owner/name@{COMMIT}"
    with pytest.raises(MpqError, match="'owner/name@other' is no folder here and could not be fetched from the hub"):
        load("owner/name@other")


def test_an_unreachable_hub_id_is_refused_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MpqError, match="could not be fetched from the hub") as error:
        load("nobody/nothing-of-that-name")
    assert "\n" not in str(error.value)


def test_a_repository_that_does_not_exist_is_refused(monkeypatch):
    response = types.SimpleNamespace(headers={}, request=None)

    def snapshot_download(*_, **__):
        raise RepositoryNotFoundError("404 Client Error.\nRepository Not Found", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(MpqError, match=r"could not be fetched from the hub \(404 Client Error\.\)"):
        load("owner/gone")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/model", "nowhere", "a/b/c", "nowhere@a/b"])
def test_what_is_no_folder_and_no_hub_id_is_refused(source):
    with pytest.raises(MpqError, match="is no folder here: give a checkpoint folder, a hub id"):
        resolve(source)


def test_local_models_are_called_like_their_folder(tmp_path, monkeypatch):
    tiny.write_folder(tmp_path / "mine")
    assert load(str(tmp_path / "mine") + "/").name == "mine"
    monkeypatch.chdir(tmp_path / "mine")
    assert load(".").name == "mine"
    assert load("reference").name == "reference"
