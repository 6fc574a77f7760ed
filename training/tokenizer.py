"""Train the byte-level BPE tokenizer that both demo models share."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training.text import TrainingError, chunks, read_text, refuse_held_out

END_OF_TEXT = "<|endoftext|>"
# Words with one leading space, runs of up to three digits, punctuation, and line breaks.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def untrained_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer with an empty vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sample(paths: list[Path], megabytes: float) -> Iterator[str]:
    """Yield evenly spread pieces of the files, about ``megabytes`` million characters in all."""
    texts = [read_text(path).replace(END_OF_TEXT, "") for path in paths]
    share = min(1.0, megabytes * 1e6 / max(1, sum(len(text) for text in texts)))
    for text in texts:
        taken = 0.0
        for number, piece in enumerate(chunks(text, 20_000), start=1):
            if taken < number * share:
                taken += 1.0
                yield piece


def train_tokenizer(pieces: Iterator[str], vocabulary: int) -> Tokenizer:
    """Train on the pieces; token 0 is the end-of-text token."""
    tokenizer = untrained_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer loads."""
    out.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load tokenizer.json from a folder written by this script."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TrainingError(f"{path} is missing; run python -m training.tokenizer first")
    return Tokenizer.from_file(str(path))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="training.tokenizer", description=__doc__)
    parser.add_argument("text", type=Path, nargs="+", help="training text, .txt or .xz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocabulary", type=int, default=8192, help="number of tokens")
    parser.add_argument("--megabytes", type=float, default=40.0, help="size of the sample")
    parser.add_argument("--context", type=int, default=512, help="the models' context length")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    try:
        refuse_held_out(options.text)
        tokenizer = train_tokenizer(sample(options.text, options.megabytes), options.vocabulary)
        save_tokenizer(tokenizer, options.out, options.context)
    except (TrainingError, OSError) as error:
        sys.exit(f"training.tokenizer: {error}")
    print(f"{tokenizer.get_vocab_size()} tokens written to {options.out}")


if __name__ == "__main__":
    main()
