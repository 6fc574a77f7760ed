"""Train one demo model from token files."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from dipnet.errors import DipnetError
from training.data import encode_text, read_tokens
from training.evaluate import choose_device
from training.models import demo_config, read_config
from training.text import TrainingError, base_name, read_text
from training.tokenizer import load_tokenizer
from training.trainer import Settings, Trainer


def held_out_tokens(
    texts: list[Path], tokenizer: Path, context: int, limit: int
) -> dict[str, torch.Tensor]:
    """Encode held-out texts and keep at most ``limit`` evenly spread windows of each."""
    result = {}
    for path in texts:
        tokens = torch.from_numpy(
            encode_text(load_tokenizer(tokenizer), read_text(path)).astype(np.int64)
        )
        rows = tokens[: len(tokens) // context * context].view(-1, context)
        keep = torch.linspace(0, len(rows) - 1, min(limit, len(rows))).long()
        result[f"{path.parent.name}/{base_name(path)}"] = rows[keep].flatten()
    return result


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="training.train", description=__doc__)
    parser.add_argument("tokens", type=Path, nargs="+", help=".bin files made by training.data")
    parser.add_argument("--model", choices=["swiglu", "relu"], required=True, help="which model")
    parser.add_argument("--config", type=Path, help="a config.json to use in place of the demo's")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="texts to score")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder, needed by --held-out")
    parser.add_argument("--windows", type=int, default=512, help="held-out windows of each text")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="most steps to take")
    parser.add_argument(
        "--max-seconds", type=float, default=defaults.max_seconds, help="most time to train"
    )
    parser.add_argument("--batch", type=int, default=defaults.batch, help="windows a step")
    parser.add_argument("--micro-batch", type=int, help="windows at a time; default: the batch")
    parser.add_argument("--warmup", type=int, default=defaults.warmup_steps, help="warm-up steps")
    parser.add_argument(
        "--learning-rate", type=float, default=defaults.learning_rate, help="at its peak"
    )
    parser.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--seed", type=int, default=0, help="for the weights and the order")
    parser.add_argument("--report-every", type=int, default=50, help="steps between lines")
    parser.add_argument("--evaluate-seconds", type=float, default=60.0, help="between scores")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the run's settings."""
    micro_batch = options.micro_batch or options.batch
    if micro_batch < 1 or options.batch % micro_batch:
        raise TrainingError("--batch must be a multiple of --micro-batch; choose another")
    return Settings(
        steps=options.steps,
        max_seconds=options.max_seconds,
        batch=options.batch,
        micro_batch=micro_batch,
        warmup_steps=options.warmup,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        compile=not options.no_compile,
        seed=options.seed,
        report_every=options.report_every,
        evaluate_seconds=options.evaluate_seconds,
    )


def run(options: argparse.Namespace) -> None:
    """Train as the options say."""
    settings = settings_of(options)
    if options.held_out and options.tokenizer is None:
        raise TrainingError("--held-out needs --tokenizer")
    tokens = read_tokens(options.tokens)
    config = read_config(options.config) if options.config else demo_config(options.model)
    context = config.max_position_embeddings
    held_out = held_out_tokens(options.held_out, options.tokenizer, context, options.windows)
    trainer = Trainer(config, tokens, settings, choose_device(options.device))
    trainer.run(held_out, options.out, lambda line: print(line, flush=True))
    print(f"checkpoint written to {options.out}: {trainer.about()}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    try:
        run(parse_arguments(arguments))
    except (DipnetError, TrainingError, OSError) as error:
        sys.exit(f"training.train: {error}")
    except KeyboardInterrupt:
        print("training.train: stopped; the last checkpoint, if any, is whole", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
