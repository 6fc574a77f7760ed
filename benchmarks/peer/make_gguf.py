"""Writes the peer's model: a GGUF of Llama architecture with seeded random Q4_0 weights.

    PEER_PYTHON benchmarks/peer/make_gguf.py OUT.gguf [--layers 40 ...]

Run by the peer's Python (the `gguf` package and numpy). One tensor is in memory at a time; the
default sizes, Phi-3-Medium's, make a file of 7.85 GB.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from shapes import Shapes, add_arguments, from_arguments

NIBBLE_STD = 85**0.5 / 2  # of q - 8 about 0 for a nibble q in 0..15: sqrt(21.25 + 0.25) to 1 %


def tensors(shapes: Shapes) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every tensor in the file's order; a norm has 0 outputs."""
    s = shapes
    yield "token_embd.weight", s.vocabulary, s.hidden
    for layer in range(s.layers):
        sizes = {
            "attn_norm": (0, s.hidden),
            "attn_q": (s.q_out, s.hidden),
            "attn_k": (s.kv_out, s.hidden),
            "attn_v": (s.kv_out, s.hidden),
            "attn_output": (s.hidden, s.q_out),
            "ffn_norm": (0, s.hidden),
            "ffn_gate": (s.ffn, s.hidden),
            "ffn_up": (s.ffn, s.hidden),
            "ffn_down": (s.hidden, s.ffn),
        }
        for name, (outputs, inputs) in sizes.items():
            yield f"blk.{layer}.{name}.weight", outputs, inputs
    yield "output_norm.weight", 0, s.hidden
    yield "output.weight", s.vocabulary, s.hidden


def q4_0(outputs: int, inputs: int, std: float, seed: tuple[int, int]) -> np.ndarray:
    """Random rows as Q4_0 bytes (outputs, inputs / 32 * 18), weights of mean 0 and this std.

    Every block has a scale of its own and of either sign: nibbles run from -8 to 7, and with
    scales of one sign their mean of -0.5 would put one large direction into every matrix.
    """
    stream = np.random.SFC64(np.random.SeedSequence(seed))
    blocks = outputs * inputs // 32
    scales = np.random.Generator(stream).uniform(0.8, 1.2, blocks).astype(np.float32)
    words = stream.random_raw(blocks * 2).view(np.uint8).reshape(blocks, 16)
    sign = np.where(stream.random_raw(blocks) & np.uint64(1), 1, -1)
    out = np.empty((blocks, 18), np.uint8)
    out[:, :2] = (scales * sign * (std / NIBBLE_STD)).astype("<f2").view(np.uint8).reshape(-1, 2)
    out[:, 2:] = words
    return out.reshape(outputs, inputs // 32 * 18)


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A SentencePiece vocabulary of three control tokens, the bytes and dummies."""
    kinds = gguf.TokenType
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    names += [f"w{i}" for i in range(len(names), size)]
    types += [kinds.NORMAL] * (size - len(types))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def add_header(writer: gguf.GGUFWriter, shapes: Shapes) -> None:
    """Everything but the weights."""
    writer.add_name("random")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shapes.layers)
    writer.add_context_length(shapes.context)
    writer.add_embedding_length(shapes.hidden)
    writer.add_feed_forward_length(shapes.ffn)
    writer.add_head_count(shapes.heads)
    writer.add_head_count_kv(shapes.kv_heads)
    writer.add_key_length(shapes.head_dim)
    writer.add_value_length(shapes.head_dim)
    writer.add_rope_dimension_count(shapes.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shapes.vocabulary)
    add_vocabulary(writer, shapes.vocabulary)
    for name, outputs, inputs in tensors(shapes):
        if outputs:
            row = inputs // 32 * 18
            writer.add_tensor_info(
                name,
                (outputs, row),
                np.dtype(np.uint8),
                outputs * row,
                gguf.GGMLQuantizationType.Q4_0,
            )
        else:
            writer.add_tensor_info(name, (inputs,), np.dtype(np.float32), 4 * inputs)


def write(path: Path, shapes: Shapes, seed: int) -> None:
    """Writes the file whole or not at all; what is written is forced out and leaves memory."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, "llama")
    add_header(writer, shapes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    for number, (name, outputs, inputs) in enumerate(tensors(shapes)):
        if outputs:
            std = 1.0 if name.startswith("token_embd") else inputs**-0.5
            data = q4_0(outputs, inputs, std, (seed, number))
        else:
            data = np.ones(inputs, np.float32)
        writer.write_tensor_data(data)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    writer.close()
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    add_arguments(parser)
    args = parser.parse_args()
    if args.vocabulary < 259 or args.hidden % 32 or args.ffn % 32:
        parser.error("the vocabulary must be at least 259, the sizes multiples of 32")
    write(args.out, from_arguments(args), args.seed)
    print(f"{args.out}: {args.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
