"""Writes our model of the comparison: a store of seeded random int4 weights, quantised by nobody.

    python benchmarks/peer/make_store.py OUT [--block 2] [--layers 40 ...]

The default sizes are Phi-3-Medium's (family `phi3`) and make a store of 8.0 GB. Nibbles and
multipliers are drawn at random, with scales that keep activations of ordinary size; what a packed
checkpoint has besides, checksums included, is here too, so `dipnet check` and `dipnet run` work.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from shapes import Shapes, add_arguments, from_arguments
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, Phi3Config, PreTrainedTokenizerFast

from dipnet._native import record_checksums
from dipnet.models.families import Decoder, context_length
from dipnet.models.load import empty_model
from dipnet.pack.records import Slab, slabs
from dipnet.pack.rest import Rest, RestTensor
from dipnet.store.geometry import (
    CHECKSUM_BYTES,
    GROUP_ALIGNMENT,
    SCALED_TOGETHER,
    column_stride,
    multiplier_bytes,
    padded_outputs,
    record_bytes,
    round_up,
    weight_bytes,
)
from dipnet.store.index import INDEX_NAME, RECORDS_NAME, REST_NAME, Group, Index, read_index

MULTIPLIERS = (100, 128)
"""Magnitudes of the multipliers; their signs are random, as nibbles have a mean of -0.5."""
STEP_STD = 114 * 85**0.5 / 2
"""Of a multiplier times a nibble about 8: what the channel's scale divides the weights' std by."""
TABLE_ROWS = 2048


def make_config(shapes: Shapes) -> Phi3Config:
    """Phi-3 with these sizes: fused qkv and gate_up, no biases, no sliding window."""
    return Phi3Config(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.ffn,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        head_dim=shapes.head_dim,
        max_position_embeddings=shapes.context,
        original_max_position_embeddings=shapes.context,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        architectures=["Phi3ForCausalLM"],
        dtype="bfloat16",
    )


def make_groups(s: Shapes, block: int) -> tuple[Group, ...]:
    """The groups of the index, one behind the other."""
    layer = {
        "attn.in": ({"q": s.q_out, "k": s.kv_out, "v": s.kv_out}, s.hidden),
        "attn.out": ({"o": s.hidden}, s.q_out),
        "mlp.in": ({"gate": s.ffn, "up": s.ffn}, s.hidden),
        "mlp.hidden": ({"down": s.hidden}, s.ffn),
    }
    wanted = [(number, name, *held) for number in range(s.layers) for name, held in layer.items()]
    wanted.append((None, "head", {"head": s.vocabulary}, s.hidden))
    groups, end = [], 0
    for number, name, matrices, channels in wanted:
        outputs = padded_outputs(sum(matrices.values()))
        stride = column_stride("int4", outputs)
        size = block if name == "mlp.hidden" else 1
        group = Group(
            layer=number,
            name=name,
            matrices=matrices,
            channels=channels,
            block=size,
            outputs=outputs,
            stride=stride,
            record_bytes=record_bytes(stride, size),
            offset=round_up(end, GROUP_ALIGNMENT),
        )
        groups.append(group)
        end = group.end
    return tuple(groups)


def random_records(group: Group, slab: Slab, seed: int) -> np.ndarray:
    """The records of a slab: (units, record_bytes) uint8, the same for the same seed."""
    stream = np.random.SFC64(np.random.SeedSequence([seed, slab.group, slab.first]))
    columns = slab.units * group.block
    weights = weight_bytes("int4", group.outputs)
    multipliers = multiplier_bytes("int4", group.outputs)
    filled = np.zeros((columns, group.stride), np.uint8)
    filled[:, :weights] = (
        stream.random_raw(columns * weights // 8).view(np.uint8).reshape(columns, weights)
    )
    generator = np.random.Generator(stream)
    drawn = generator.integers(*MULTIPLIERS, (columns, multipliers), np.int8)
    drawn *= generator.integers(0, 2, drawn.shape, np.int8) * 2 - 1
    drawn[:, group.rows // SCALED_TOGETHER :] = 0  # the rows that fill the last tile are zero
    filled[:, weights : weights + multipliers] = drawn.view(np.uint8)
    records = np.zeros((slab.units, group.record_bytes), np.uint8)
    records[:, : group.block * group.stride] = filled.reshape(slab.units, -1)
    sums = record_checksums(records, group=slab.group, first_unit=slab.first)
    records[:, -CHECKSUM_BYTES:] = sums.astype("<u8")[:, None].view(np.uint8)
    return records


def write_records(path: Path, groups: tuple[Group, ...], seed: int) -> None:
    """records.bin; what is written is forced out and leaves memory."""
    with path.open("wb", buffering=0) as file:
        for slab in slabs(groups):
            group = groups[slab.group]
            file.seek(group.offset_of(slab.first))
            file.write(random_records(group, slab, seed))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.truncate(groups[-1].end)


def rest_pieces(
    rest: Rest, groups: tuple[Group, ...], seed: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Offset and values of every piece: scales, norms of ones, the random embedding table."""
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        around = torch.empty(group.channels).uniform_(0.8, 1.2, generator=generator)
        yield rest.begin(group.scale_name), around / (STEP_STD * group.channels**0.5)
    for tensor in rest.tensors:
        if not tensor.table:
            yield rest.begin(tensor.name), torch.ones(tensor.shape)
            continue
        rows, width = tensor.shape
        for start in range(0, rows, TABLE_ROWS):
            piece = torch.randn(min(TABLE_ROWS, rows - start), width, generator=generator)
            yield rest.begin(tensor.name) + 2 * start * width, piece.bfloat16()


def write_rest(path: Path, rest: Rest, groups: tuple[Group, ...], seed: int) -> str:
    """rest.safetensors; returns its SHA-256."""
    with path.open("wb") as file:
        file.write(rest.header)
        for offset, values in rest_pieces(rest, groups, seed):
            file.seek(offset)
            file.write(values.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """A word is a token: "the" is 3, "w4" is 4, and so on."""
    words = ["<unk>", "<s>", "</s>", "the", *(f"w{i}" for i in range(4, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def make(out: Path, shapes: Shapes, block: int, seed: int) -> Index:
    """Writes the store beside `out` and gives it that name when it is whole."""
    config = make_config(shapes)
    model = empty_model(config)
    groups = make_groups(shapes, block)
    tensors = [
        RestTensor(name, name, tuple(value.shape), table=value.dim() == 2)
        for name, value in model.state_dict().items()
        if value.dim() == 1 or name == "model.embed_tokens.weight"
    ]
    rest = Rest([(group.scale_name, group.channels) for group in groups], tensors)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_records(partial / RECORDS_NAME, groups, seed)
    spec = Decoder(model).spec
    index = Index(
        weights="int4",
        family=spec.family,
        activation=spec.activation,
        layers=spec.layers,
        context=context_length(model),
        source="random",
        neurons_permuted=False,
        records_bytes=groups[-1].end,
        rest_bytes=rest.size,
        rest_sha256=write_rest(partial / REST_NAME, rest, groups, seed),
        groups=groups,
    )
    config.save_pretrained(partial)
    GenerationConfig(bos_token_id=1, eos_token_id=2).save_pretrained(partial)
    save_tokenizer(partial, shapes.vocabulary)
    (partial / INDEX_NAME).write_text(index.model_dump_json(indent=1) + "\n")
    partial.rename(out)
    return read_index(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--block", type=int, default=2, help="neurons of one mlp.hidden record")
    add_arguments(parser)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already: remove it, or name another folder")
    shapes = from_arguments(args)
    if shapes.vocabulary % SCALED_TOGETHER or shapes.ffn % args.block:
        parser.error("the vocabulary must be a multiple of 32, --ffn one of --block")
    index = make(args.out, shapes, args.block, args.seed)
    print(f"{args.out}: {(index.records_bytes + index.rest_bytes) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
