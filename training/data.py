"""Turn text files into files of token numbers (uint16), one per text file."""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.text import TrainingError, base_name, chunks, read_text, refuse_held_out
from training.tokenizer import END_OF_TEXT, load_tokenizer

CHUNK_CHARACTERS = 400_000
_worker_tokenizer: Tokenizer | None = None


def _start_worker(folder: Path) -> None:
    """Load the tokenizer once in each worker process."""
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(folder)


def _encode_in_worker(piece: str) -> bytes:
    """Encode one piece in a worker process."""
    assert _worker_tokenizer is not None
    numbers = _worker_tokenizer.encode(piece, add_special_tokens=False).ids
    return np.array(numbers, dtype=np.uint16).tobytes()


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Encode a whole text in this process, as it is."""
    parts = [
        np.array(encoding.ids, dtype=np.uint16)
        for encoding in tokenizer.encode_batch(
            list(chunks(text, CHUNK_CHARACTERS)), add_special_tokens=False
        )
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)


def encode_documents(text: str, tokenizer: Path, processes: int) -> np.ndarray:
    """Encode training text with several processes and end it with the end-of-text token.

    The line breaks around an end-of-text token in the text are dropped.
    """
    text = text.replace(f"\n{END_OF_TEXT}\n", END_OF_TEXT)
    with multiprocessing.get_context("spawn").Pool(
        processes, initializer=_start_worker, initargs=(tokenizer,)
    ) as pool:
        parts = pool.map(_encode_in_worker, chunks(text, CHUNK_CHARACTERS), chunksize=1)
    end = load_tokenizer(tokenizer).token_to_id(END_OF_TEXT)
    return np.concatenate([*(np.frombuffer(part, dtype=np.uint16) for part in parts), [end]])


def write_tokens(tokens: np.ndarray, path: Path, about: dict[str, object]) -> None:
    """Write the tokens and, beside them, a .json file that says what they are."""
    temporary = path.with_name(path.name + ".tmp")
    tokens.astype(np.uint16).tofile(temporary)
    os.replace(temporary, path)
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")


def read_tokens(paths: Iterable[Path]) -> np.ndarray:
    """Read token files, refusing held-out ones, and join them."""
    paths = list(paths)
    refuse_held_out(paths)
    for path in paths:
        if path.suffix != ".bin" or not path.is_file():
            raise TrainingError(f"{path} is not a .bin token file; make it with training.data")
    return np.concatenate([np.fromfile(path, dtype=np.uint16) for path in paths])


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="training.data", description=__doc__)
    parser.add_argument("text", type=Path, nargs="+", help="training text, .txt or .xz")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many to use")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    try:
        refuse_held_out(options.text)
        options.out.mkdir(parents=True, exist_ok=True)
        for path in options.text:
            start = time.perf_counter()
            text = read_text(path)
            tokens = encode_documents(text, options.tokenizer, options.processes)
            size = len(text.encode("utf-8"))
            about = {"source": path.name, "bytes": size, "tokens": len(tokens)}
            write_tokens(tokens, options.out / f"{base_name(path)}.bin", about)
            seconds = time.perf_counter() - start
            print(f"{path.name}: {size} bytes, {len(tokens)} tokens, {seconds:.1f} s", flush=True)
    except (TrainingError, OSError) as error:
        sys.exit(f"training.data: {error}")


if __name__ == "__main__":
    main()
