"""The training scripts, on tiny models and texts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig

from dipnet.eval.perplexity import perplexity
from dipnet.models.compact import dequantize
from training import checkpoint, quantize
from training.data import encode_text, read_tokens
from training.evaluate import evaluate_file, load_model
from training.excerpts import spread_excerpts
from training.models import build_model, demo_config
from training.optimizer import Schedule
from training.text import TrainingError, chunks, refuse_held_out
from training.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from training.trainer import Settings, Trainer

TEXT = "The old clock struck ten.\n\nNobody came, and the rain fell on.\n  \nA door shut.\n" * 60
CPU = torch.device("cpu")


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    save_tokenizer(train_tokenizer(iter([TEXT]), 300), folder, context=16)
    return folder


def test_training_lowers_the_loss(tokenizer: Path, tmp_path: Path) -> None:
    tokens = encode_text(load_tokenizer(tokenizer), TEXT)
    settings = Settings(
        steps=40,
        batch=8,
        micro_batch=4,
        warmup_steps=2,
        learning_rate=1e-2,
        compile=False,
        report_every=5,
    )
    trainer = Trainer(tiny_config(), tokens, settings, CPU)
    text = torch.from_numpy(tokens.astype(np.int64))
    before = trainer.held_out_loss(text)
    trainer.run({"seen": text}, tmp_path / "out", lambda line: None)
    after = trainer.held_out_loss(text)
    assert after < before - 1.0
    saved = load_model(tmp_path / "out", CPU)
    assert perplexity(saved, text, window=16).nll == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["test.txt.xz", "wiki.valid.tokens", "HeldOut.txt", "held_out.bin", "my-test.bin"]
)
def test_held_out_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("text")
    link = tmp_path / "books.txt"
    link.symlink_to(path)
    for refused in (path, link):
        with pytest.raises(TrainingError, match="held-out"):
            refuse_held_out([refused])
    with pytest.raises(TrainingError, match="held-out"):
        read_tokens([path])


def test_quantisation_error_is_at_most_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 33) * torch.logspace(-3, 2, 7)[:, None]
    weight[3] = 0
    compact = quantize.quantize_state({"a": weight, "b": torch.ones(4)})
    restored = dequantize(compact)
    assert compact["a"].dtype == torch.int8
    assert compact["a.scale"].shape == (7, 1)
    assert set(restored) == {"a", "b"}
    assert ((restored["a"] - weight).abs() <= compact["a.scale"] * 0.5001).all()


def test_the_compact_file_says_its_format_and_stores_no_tied_head(tmp_path: Path) -> None:
    model = build_model(tiny_config(), CPU, seed=0)
    quantize.save_compact(checkpoint.untied_state(model), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "dipnet-int8-rows", "version": "1"}
        names = set(file.keys())
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight.scale" in names


def test_an_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save_tensors({"a": torch.ones(2)}, path, {})

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_tensors({"a": torch.zeros(2)}, path, {})
    assert load_file(path)["a"].tolist() == [1.0, 1.0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_pieces_encode_to_the_tokens_of_the_whole(tokenizer: Path) -> None:
    loaded = load_tokenizer(tokenizer)
    pieces = list(chunks(TEXT, 100))
    assert "".join(pieces) == TEXT
    assert len(pieces) > 10
    parts = [number for piece in pieces for number in loaded.encode(piece).ids]
    assert parts == loaded.encode(TEXT).ids


def test_evaluation_scores_all_but_the_first_token_of_each_window(
    tokenizer: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    count = len(load_tokenizer(tokenizer).encode(TEXT).ids)
    model = build_model(tiny_config(), CPU, seed=0)
    result = evaluate_file(model, tokenizer, path, context=16, batch=7)
    full, rest = divmod(count, 16)
    assert result.tokens == full * 15 + max(0, rest - 1)
    assert result.nats == pytest.approx(np.log(300), abs=0.3)


def test_the_schedule_ends_by_its_last_step_or_second() -> None:
    schedule = Schedule(steps=100, seconds=10, warmup_steps=10)
    assert schedule.factor(0, 0) == pytest.approx(0.1)
    assert schedule.factor(50, 0) == pytest.approx(0.5)
    assert schedule.factor(50, 8) == pytest.approx(0.2)
    assert schedule.progress(100, 0) == schedule.progress(1, 11) == 1


@pytest.mark.parametrize(("name", "most"), [("swiglu", 22.3e6), ("relu", 23.3e6)])
def test_demo_models_have_the_intended_size(name: str, most: float) -> None:
    with torch.device("meta"):
        model = build_model(demo_config(name), torch.device("meta"), seed=0)
    assert 0.98 * most < model.num_parameters() <= most


def test_excerpts_are_whole_paragraphs() -> None:
    paragraphs = [f"Paragraph {number}. " + "word " * 20 for number in range(400)]
    text = "\n\n".join(paragraphs)
    cut = spread_excerpts(text, count=4, kilobytes=8)
    assert set(cut.strip("\n").split("\n\n")) <= set(paragraphs)
    assert 6 * 1024 < len(cut) <= 8 * 1024 + 8
