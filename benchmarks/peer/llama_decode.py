"""Decodes with llama.cpp, batch 1, greedily; ends with one JSON line of seconds per token.

    PEER_PYTHON benchmarks/peer/llama_decode.py MODEL.gguf [--tokens 16] [--repack] [--no-mmap]

Run by the peer's Python (llama-cpp-python). `--repack` is llama.cpp's default: it copies the
weights into a layout of its own, which is faster and cannot be paged back in from the file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np

ERROR = 4  # GGML_LOG_LEVEL_ERROR


@lib.llama_log_callback
def only_errors(level: int, text: bytes, _: object) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def peak_rss() -> int:
    """VmHWM of this process in bytes, pages of a mapped file included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def load(args: argparse.Namespace) -> tuple[object, object]:
    """Model and context; one line where llama.cpp cannot load the file."""
    lib.llama_log_set(only_errors, None)
    lib.llama_backend_init()
    how = lib.llama_model_default_params()
    how.n_gpu_layers = 0
    how.use_extra_bufts = args.repack
    how.load_mode = lib.LLAMA_LOAD_MODE_NONE if args.no_mmap else lib.LLAMA_LOAD_MODE_MMAP
    model = lib.llama_model_load_from_file(str(args.model).encode(), how)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {args.model}")
    wanted = lib.llama_context_default_params()
    wanted.n_ctx = args.context
    # No batch is larger than the prompt: what the buffers do not take is left to the page cache.
    wanted.n_batch = wanted.n_ubatch = len(args.prompt)
    wanted.n_threads = wanted.n_threads_batch = args.threads
    context = lib.llama_init_from_model(model, wanted)
    if not context:
        raise SystemExit("llama.cpp cannot make a context")
    return model, context


def decode(model: object, context: object, prompt: list[int], tokens: int) -> list[float]:
    """Seconds of the prompt's tokens, one at a time, and then of the tokens decoded after it.

    One at a time, because with more llama.cpp 0.3.36 built by gcc 12 dies of an illegal
    instruction on CPUs with AMX (pull request 26954 there); decoding does not use AMX.
    """
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    seconds, fed = [], prompt[0]
    for step in range(len(prompt) + tokens):
        start = time.perf_counter()
        if lib.llama_decode(context, lib.llama_batch_get_one((ctypes.c_int32 * 1)(fed), 1)):
            raise SystemExit("llama.cpp could not decode")
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (size,))
        best = int(logits.argmax())
        seconds.append(time.perf_counter() - start)
        if not np.isfinite(logits).all():
            raise SystemExit("llama.cpp computed logits that are not finite")
        fed = prompt[step + 1] if step + 1 < len(prompt) else best
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, nargs="+", default=[1, 400, 500, 600], metavar="ID")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repack", action="store_true", help="llama.cpp's default")
    parser.add_argument("--no-mmap", action="store_true", help="read the file into memory")
    args = parser.parse_args()
    start = time.perf_counter()
    model, context = load(args)
    loading = time.perf_counter() - start
    seconds = decode(model, context, args.prompt, args.tokens)
    decoded = seconds[len(args.prompt) :]
    result = {
        "engine": "llama.cpp",
        "repack": args.repack,
        "mmap": not args.no_mmap,
        "threads": args.threads,
        "load_seconds": loading,
        "prompt_seconds": seconds[: len(args.prompt)],
        "seconds_per_token": decoded,
        "median_seconds": statistics.median(decoded),
        "peak_rss": peak_rss(),
        "system": lib.llama_print_system_info().decode(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
