"""Where texts come from, and their tokens."""

import hashlib
import sys
from pathlib import Path

import datasets
import pytest

from dipnet.errors import InputError
from dipnet.eval.texts import bos_token, bundled_text, dataset_text, read_text, tokenize
from dipnet.models.load import LoadedModel


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    content = "naïve\r\n“café”"
    file.write_bytes(content.encode())
    text = read_text(file)
    assert (text.name, text.content) == (str(file), content)
    assert text.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no text file"),
        (b"", "is empty: give one with some words"),
        (b" \n\t", "is empty"),
        (b"ab\xff", r"is not UTF-8 text \(byte 2\): convert it"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(file)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder: give a text file"):
        read_text(tmp_path)


@pytest.mark.parametrize("which", ["heldout", "calibration"])
def test_bundled_texts_exist(which: str) -> None:
    assert len(bundled_text(which).content) > 100_000  # type: ignore[arg-type]


def test_tokens_are_those_of_the_tokenizer(loaded: LoadedModel) -> None:
    text = "It was a dark night.\n\nNobody slept."
    tokens = tokenize(loaded.tokenizer, text)
    assert tokens.dim() == 1
    assert loaded.tokenizer.decode(tokens) == text


def test_long_texts_are_tokenised_in_silence(
    loaded: LoadedModel, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    assert len(tokenize(loaded.tokenizer, "a ship " * 5000)) > loaded.tokenizer.model_max_length
    captured = capfd.readouterr()
    assert not captured.err
    assert not recwarn.list


def test_bos_follows_the_tokenizer(loaded: LoadedModel) -> None:
    class Adding:
        bos_token_id = 7

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [7, 3]}

    class Lacking:
        bos_token_id = None

    assert bos_token(loaded.tokenizer) is None
    assert bos_token(loaded.tokenizer, "on") == 0
    assert bos_token(Adding()) == 7  # type: ignore[arg-type]
    assert bos_token(Adding(), "off") is None  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has no BOS token"):
        bos_token(Lacking(), "on")  # type: ignore[arg-type]


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline_cache")
def test_a_local_folder_of_data_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')
    text = dataset_text(str(folder))
    assert text.content == "One.\n\nTwo."
    assert text.name == f"{folder}:test:text"
    with pytest.raises(InputError, match=r"no column 'body'; it has: text \(--column\)"):
        dataset_text(str(folder), column="body")
    with pytest.raises(InputError, match="cannot load split 'valid'"):
        dataset_text(str(folder), split="valid")


def test_saved_datasets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["One.", "Two."]})
    rows.save_to_disk(str(tmp_path / "rows"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "splits"))
    assert dataset_text(str(tmp_path / "rows")).content == "One.\n\nTwo."
    assert dataset_text(str(tmp_path / "splits")).content == "One.\n\nTwo."
    with pytest.raises(InputError, match="cannot load split 'train'"):
        dataset_text(str(tmp_path / "splits"), split="train")


@pytest.mark.usefixtures("offline_cache")
def test_a_dataset_that_cannot_be_had() -> None:
    with pytest.raises(InputError, match="cannot load split 'test' of dataset 'nobody/nothing'"):
        dataset_text("nobody/nothing")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'dipnet\[datasets\]'"):
        dataset_text("wikitext")
