"""Generation: what ``generate()`` gives, streamed and timed."""

from collections.abc import Iterator

import pytest
import torch

from dipnet.errors import InputError
from dipnet.eval.generate import Sampling, encode_prompt, generate
from dipnet.models.load import LoadedModel
from tests.checkpoints import CONTEXT, WORDS


def test_is_hugging_faces_text(loaded: LoadedModel) -> None:
    prompt = encode_prompt(loaded, WORDS)
    pieces: list[str] = []
    made = generate(loaded, prompt, max_new_tokens=12, write=pieces.append)
    expected = loaded.model.generate(prompt, max_new_tokens=12, do_sample=False)
    new = expected[0, prompt.shape[1] :]
    assert made.text == "".join(pieces) == loaded.tokenizer.decode(new, skip_special_tokens=True)
    assert (made.prompt_tokens, made.new_tokens) == (prompt.shape[1], 12)
    assert not made.ended
    assert made.tokens_per_second is not None
    assert made.tokens_per_second > 0


def test_the_seed_decides(loaded: LoadedModel) -> None:
    prompt = encode_prompt(loaded, WORDS)

    def text(seed: int) -> str:
        return generate(loaded, prompt, max_new_tokens=8, sampling=Sampling(1.0, seed=seed)).text

    assert text(1) == text(1) != text(2)


def test_stops_at_the_end_of_the_context(loaded: LoadedModel) -> None:
    prompt = encode_prompt(loaded, WORDS)
    made = generate(loaded, prompt, max_new_tokens=1000)
    assert made.new_tokens == CONTEXT - made.prompt_tokens


def test_a_single_token_has_no_rate(loaded: LoadedModel) -> None:
    assert generate(loaded, encode_prompt(loaded, "A"), max_new_tokens=1).tokens_per_second is None


@pytest.mark.parametrize(
    ("prompt", "chat", "message"),
    [
        ("", False, "the prompt is empty"),
        (" \n", False, "the prompt is empty"),
        ("word " * 100, False, r"the prompt has \d+ tokens, .* 64: shorten the prompt to 63"),
        ("Hello", True, "has no chat template: leave out --chat"),
    ],
)
def test_bad_prompts(loaded: LoadedModel, prompt: str, chat: bool, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_prompt(loaded, prompt, chat=chat)


def test_the_chat_template_is_applied(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} ->"
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    tokens = encode_prompt(loaded, "Hello", chat=True)
    assert loaded.tokenizer.decode(tokens[0]) == "[user] Hello ->"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, r"top-p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top-p must be in \(0, 1\]"),
    ],
)
def test_bad_sampling(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.fixture
def poisoned(loaded: LoadedModel) -> Iterator[LoadedModel]:
    weight = loaded.model.get_decoder().layers[1].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    yield loaded
    with torch.no_grad():
        weight.copy_(kept)


def test_nan_is_an_error(poisoned: LoadedModel) -> None:
    with pytest.raises(InputError, match=r"not finite .* try another dtype \(--dtype float32\)"):
        generate(poisoned, encode_prompt(poisoned, WORDS), max_new_tokens=3)
