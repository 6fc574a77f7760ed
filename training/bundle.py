"""Turn a trained checkpoint into a compact int8 model with a card of measured figures."""

import argparse
import sys
from pathlib import Path

from dipnet.errors import DipnetError
from training.card import Scores, model_card
from training.checkpoint import save_config
from training.evaluate import choose_device, describe, evaluate_file, load_model
from training.models import read_config
from training.quantize import load_about, load_state, save_compact
from training.text import TrainingError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="training.bundle", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder written by training.train")
    parser.add_argument("--name", required=True, help="the model's name in the card")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--machine", default="one NVIDIA H200", help="what it was trained on")
    parser.add_argument("--gutenberg-test", type=Path, required=True, help="held-out books")
    parser.add_argument("--wikitext-test", type=Path, required=True, help="WikiText-2 test text")
    parser.add_argument("--batch", type=int, default=64, help="windows scored at a time")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> list[Scores]:
    """Score the checkpoint and the compact weights on both test texts."""
    device = choose_device(options.device)
    original = load_model(options.checkpoint, device)
    compact = load_model(options.out, device)
    context = original.config.max_position_embeddings
    texts = {"Gutenberg test": options.gutenberg_test, "WikiText-2 test": options.wikitext_test}
    scores = []
    for name, path in texts.items():
        results = [
            evaluate_file(model, options.tokenizer, path, context, options.batch)
            for model in (compact, original)
        ]
        print(describe(f"{options.name} int8 on {name}", results[0]), flush=True)
        print(describe(f"{options.name} float32 on {name}", results[1]), flush=True)
        scores.append(Scores(name, *results))
    return scores


def run(options: argparse.Namespace) -> None:
    """Write the compact weights, measure them, and write the card."""
    about = load_about(options.checkpoint)
    config = read_config(options.checkpoint / "config.json")
    save_compact(load_state(options.checkpoint), options.out)
    save_config(config, options.out)
    card = model_card(options.name, config, about, measure(options), options.machine)
    (options.out / "README.md").write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{options.out}: {size} bytes")


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    try:
        run(parse_arguments(arguments))
    except (DipnetError, TrainingError, OSError) as error:
        sys.exit(f"training.bundle: {error}")


if __name__ == "__main__":
    main()
