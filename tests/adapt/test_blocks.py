"""Walking the blocks one by one gives what the whole model computes."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet.adapt.blocks import walk_blocks
from tests.families import every_family, random_tokens, shared, tiny
from tests.matrix import CLOSE

WINDOWS = [random_tokens(1, 9, seed=1), random_tokens(2, 9, seed=2), random_tokens(1, 4, seed=3)]


@torch.no_grad()
def block_outputs(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """What each decoder block of the running model puts out."""
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        for block in model.get_decoder().layers
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


@every_family
def test_dense(family: str) -> None:
    model = shared(family)
    expected = zip(*(block_outputs(model, window) for window in WINDOWS), strict=True)
    for block, outputs in zip(walk_blocks(model, WINDOWS), expected, strict=True):
        for walked, whole in zip(block.outputs(), outputs, strict=True):
            torch.testing.assert_close(walked, whole, **CLOSE)


@every_family
def test_pruned_blocks_pass_on_what_a_pruned_model_computes(family: str) -> None:
    method = dipnet.DIP(0.5, attention_density=0.5)
    with dipnet.sparsify(tiny(family), method) as pruned:
        expected = [block_outputs(pruned, window) for window in WINDOWS]
    for layer, block in enumerate(walk_blocks(shared(family), WINDOWS)):
        block.pass_on(method)
        for walked, whole in zip(block.outputs(method), expected, strict=True):
            torch.testing.assert_close(walked, whole[layer], **CLOSE)


@every_family
def test_the_next_block_sees_the_dense_output_unless_told_otherwise(family: str) -> None:
    model = shared(family)
    expected = [block_outputs(model, window)[-1] for window in WINDOWS]
    for block in walk_blocks(model, WINDOWS):
        block.outputs(dipnet.DIP(0.3))
        walked = block.outputs()
    for last, whole in zip(walked, expected, strict=True):
        torch.testing.assert_close(last, whole, **CLOSE)


@every_family
def test_error_is_relative_to_the_dense_output(family: str) -> None:
    method = dipnet.GLUOracle(0.4)
    for block in walk_blocks(shared(family), WINDOWS):
        pairs = list(zip(block.outputs(method), block.outputs(), strict=True))
        wrong = torch.cat([(pruned - dense).flatten() for pruned, dense in pairs]).norm()
        right = torch.cat([dense.flatten() for _, dense in pairs]).norm()
        assert block.error(method) == pytest.approx(float(wrong / right), rel=1e-5)
        assert block.error(dipnet.GLUOracle(1.0)) == 0
