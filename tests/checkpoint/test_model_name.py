"""What stands where a model is wanted and is none: the message names what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.checkpoint.model_name import check_hub_id, is_hub_id, model_path
from nf4_pipeline.errors import UsageError
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel, wanted_files

from tests.support.command_line import refusal

ID = "tiiuae/falcon-7b"
PULL = "--revision refs/pr/3"


@pytest.mark.parametrize("host", ["https://huggingface.co", "http://www.hf.co", "hf.co", "hf:/"])
@pytest.mark.parametrize(
    ("path", "meant"),
    [
        (ID, ID),
        (f"{ID}/", ID),
        (f"models/{ID}", ID),
        (f"{ID}?library=transformers", ID),
        (f"{ID}#usage", ID),
        (f"{ID}/tree/main", ID),
        (f"{ID}/tree/v2", f"{ID} --revision v2"),
        (f"{ID}/tree/refs%2Fpr%2F3", f"{ID} {PULL}"),
        (f"{ID}/tree/refs/pr/3", f"{ID} {PULL}"),
        (f"{ID}/blob/v2/config.json", f"{ID} --revision v2"),
        (f"{ID}/resolve/main/model.safetensors", ID),
        (f"{ID}/commit/{'ab' * 20}", f"{ID} --revision {'ab' * 20}"),
        (f"{ID}/discussions/4", ID),
    ],
)
def test_an_address_of_the_hub(host: str, path: str, meant: str) -> None:
    assert refusal(lambda: check_hub_id(f"{host}/{path}")).endswith(f"by its id: {meant}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("https://huggingface.co/datasets/allenai/c4", "a data set"),
        ("https://huggingface.co/spaces/a/b", "a Space"),
        ("https://huggingface.co/tiiuae", "names no model"),
        ("https://huggingface.co/", "names no model"),
        ("https://example.com/model.safetensors", "fetched from the Hub alone"),
        ("s3://bucket/model", "fetched from the Hub alone"),
        ("git@hf.co:tiiuae/falcon-7b", "fetched from the Hub alone"),
        ("falcon-7b-instruct", "ORG/NAME"),
        ("a/b/c", "no such folder"),
        ("tiiuae/falcon-7b/", "Did you mean 'tiiuae/falcon-7b'?"),
        ("Sampel", "Did you mean 'sample'?"),
    ],
)
def test_what_is_no_model(name: str, said: str) -> None:
    assert said in refusal(lambda: check_hub_id(name))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.gguf", "GGUF"),
        ("Model.Q4_K_M.GGUF", "GGUF"),
        ("model.safetensors", "file of weights"),
        ("pytorch_model.bin", "file of weights"),
        ("consolidated.00.pth", "file of weights"),
        ("model.tar.gz", "Unpack"),
        ("model.zip", "Unpack"),
        ("README.md", "is a file"),
    ],
)
@pytest.mark.parametrize("beside", [True, False], ids=["in a model", "alone"])
def test_a_file(tmp_path: Path, name: str, said: str, beside: bool) -> None:
    (tmp_path / name).write_bytes(b"")
    if beside:
        (tmp_path / "config.json").write_text("{}")
    message = refusal(lambda: check_hub_id(str(tmp_path / name)))
    if beside and said not in ("GGUF", "Unpack"):
        assert message.endswith(f"the folder that holds all of them: {tmp_path}")
    else:
        assert said in message


def test_a_file_that_looks_like_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        check_hub_id("org/name")
    check_hub_id("org/other")


def test_folders_with_a_name_that_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("falcon-7b", "llama", "unlike"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert "Did you mean 'falcon-7b'?" in refusal(lambda: check_hub_id("falcon7b"))
    assert f"Did you mean '{tmp_path}/llama'?" in refusal(lambda: check_hub_id(f"{tmp_path}/lama"))


@pytest.mark.parametrize("name", ["", " ", "\t\n"])
def test_an_empty_name(name: str) -> None:
    with pytest.raises(UsageError, match=r'is empty.*"sample"'):
        model_path(name)


@given(st.text(max_size=60))
def test_any_name_is_a_hub_id_or_refused(name: str) -> None:
    if not (message := refusal(lambda: check_hub_id(name))):
        assert is_hub_id(name)
    assert len(message) < 800


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
        (["model.Q4_K_M.gguf"], "16-bit checkpoint"),
        (["pytorch_model.bin"], "--allow-pickle"),
        (["README.md"], "none at all"),
    ],
)
def test_a_repo_without_a_model(files: list[str], said: str) -> None:
    listed = tuple(RemoteFile(name, 1, None, None) for name in files)
    model = RemoteModel("me/model", "ab" * 20, listed)
    assert said in refusal(lambda: wanted_files(model))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("falcon-7b@main", "begins with its owner): tiiuae/falcon-7b --revision main"),
        (f"{ID}@main", f"an option: {ID} --revision main"),
        (f"{ID}@refs/pr/3", f"an option: {ID} --revision refs/pr/3"),
        (f"{ID}@{'ab' * 20}", f"an option: {ID} --revision {'ab' * 20}"),
        ("org--model@0123456789ab", "looks like the name of a build"),
        ("model@0123456789ab-calibrated-3fa2", "looks like the name of a build"),
        ("./model@main", "no such folder; looked for"),
        ("builds/model@main", "no such folder; looked for"),
        ("@", "no such folder, and not a Hub id"),
        (f"{ID}@", "no such folder, and not a Hub id"),
    ],
)
def test_a_revision_behind_a_name(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "builds").mkdir()
    monkeypatch.chdir(tmp_path)
    assert said in refusal(lambda: check_hub_id(name))
