"""Measure held-out perplexity over windows that do not overlap."""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from dipnet.errors import DipnetError
from dipnet.eval.perplexity import perplexity
from training.data import encode_text
from training.models import build_model, read_config
from training.quantize import load_state
from training.text import TrainingError, read_text
from training.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats over the scored tokens of one text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(self.nats)

    @property
    def bits_per_byte(self) -> float:
        """Mean loss of a token in bits, over the mean bytes of a token."""
        return self.nats / math.log(2) * self.tokens / self.bytes


def choose_device(name: str | None) -> torch.device:
    """Return the named device, or the GPU if there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def evaluate_file(
    model: PreTrainedModel, tokenizer: Path, text: Path, context: int, batch: int
) -> Evaluation:
    """Score a whole text file as it is."""
    content = read_text(text)
    tokens = torch.from_numpy(encode_text(load_tokenizer(tokenizer), content).astype(np.int64))
    result = perplexity(model, tokens, window=context, batch_size=batch)
    mean_bytes = len(content.encode("utf-8")) / len(tokens)
    return Evaluation(result.nll, result.tokens, round(mean_bytes * result.tokens))


def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """Load a float32 model from a checkpoint folder or a compact one."""
    model = build_model(read_config(folder / "config.json"), device, seed=0)
    missing, unexpected = model.load_state_dict(load_state(folder), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise TrainingError(f"{folder} does not hold the weights that its config.json describes")
    model.tie_weights()
    return model.eval()


def describe(name: str, result: Evaluation) -> str:
    """Return one line for a person to read."""
    return (
        f"{name}: perplexity {result.perplexity:.3f}, {result.nats:.4f} nats per token, "
        f"{result.bits_per_byte:.4f} bits per byte, {result.tokens} tokens scored"
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="training.evaluate", description=__doc__)
    parser.add_argument("text", type=Path, nargs="+", help="held-out text, .txt or .xz")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint or compact folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--batch", type=int, default=64, help="windows scored at a time")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    try:
        model = load_model(options.model, choose_device(options.device))
        context = model.config.max_position_embeddings
        for text in options.text:
            result = evaluate_file(model, options.tokenizer, text, context, options.batch)
            print(describe(f"{options.model.name} on {text.name}", result), flush=True)
    except (DipnetError, TrainingError, OSError) as error:
        sys.exit(f"training.evaluate: {error}")


if __name__ == "__main__":
    main()
