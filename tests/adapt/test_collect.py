"""What predictors learn from is what the dense model did, and takes a bounded room."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dipnet.adapt.collect import CODE, Collector, Rule, Sample, Seen, calls, decoded
from dipnet.methods.predictors import Kind
from dipnet.models.families import Decoder
from tests.families import every_family, random_tokens, shared, tiny
from tests.reference import linear_layers

WINDOWS = random_tokens(3, 20, seed=4)
CPU = torch.device("cpu")


def collector(
    model: PreTrainedModel, look_ahead: int = 1, magnitude: float = 1.0, weight: float = 1.0
) -> Collector:
    rules: dict[Kind, Rule] = {
        "mlp": Rule(0.25, magnitude, weight),
        "head": Rule(0.5, magnitude, weight),
    }
    return Collector(Decoder(model), rules, look_ahead, CPU)


@torch.no_grad()
def inputs_of(model: PreTrainedModel, matrix: str) -> list[Tensor]:
    """For each layer the (tokens, channels) input of the linear layer of ``matrix``."""
    seen: list[Tensor] = []
    handles = []
    for layer in model.get_decoder().layers:
        for module, held in linear_layers(layer, model.config).items():
            if matrix in [name for name, _ in held]:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _module, args: seen.append(args[0].flatten(0, -2))
                    )
                )
    model(WINDOWS)
    for handle in handles:
        handle.remove()
    return seen


@every_family
def test_a_token_wants_its_largest_neurons(family: str) -> None:
    model = shared(family)
    seen = collector(model).see(WINDOWS)
    for codes, hidden in zip(seen.codes["mlp"], inputs_of(model, "down"), strict=True):
        k = round(0.25 * hidden.shape[-1])
        wanted = torch.zeros(hidden.shape, dtype=torch.bool)
        wanted.scatter_(1, hidden.abs().topk(k).indices, True)
        wanted &= hidden != 0  # OPT's ReLU may leave fewer
        assert torch.equal(codes != 0, wanted)
        mean = hidden.abs()[wanted].mean()
        torch.testing.assert_close(
            decoded(codes)[wanted].double(), hidden.abs()[wanted] / mean, rtol=0.13, atol=1e-4
        )


@every_family
def test_a_token_wants_the_heads_that_put_out_most(family: str) -> None:
    model = shared(family)
    seen = collector(model).see(WINDOWS)
    heads = model.config.num_attention_heads
    for codes, x in zip(seen.codes["head"], inputs_of(model, "o"), strict=True):
        norms = x.view(len(x), heads, -1).square().sum(-1).sqrt()
        best = norms.topk(round(0.5 * heads)).indices
        assert torch.equal((codes != 0).nonzero()[:, 1].view(best.shape), best.sort().values)


@every_family
@pytest.mark.parametrize("look_ahead", [0, 1, 2])
def test_each_layer_reads_its_own_place(family: str, look_ahead: int) -> None:
    made = collector(shared(family), look_ahead)
    for kind, first in (("mlp", 1), ("head", 0)):
        places = [made.places[row] for row in made.rows(kind)]
        assert places == [max(0, 2 * layer + first - look_ahead) for layer in range(2)]


@torch.no_grad()
def test_the_residual_stream_is_that_of_the_model() -> None:
    model = tiny("llama")  # asking for hidden states leaves hooks of transformers behind
    seen = collector(model).see(WINDOWS)
    states = model(WINDOWS, output_hidden_states=True).hidden_states
    assert seen.places.dtype == torch.float16
    for row, place in enumerate(collector(model).places):
        if place % 2 == 0:
            expected = states[place // 2].flatten(0, -2)
            torch.testing.assert_close(seen.places[row].double(), expected, rtol=1e-3, atol=1e-3)


def test_a_model_in_bfloat16_keeps_its_own_precision() -> None:
    seen = collector(shared("llama", torch.bfloat16)).see(WINDOWS)
    assert seen.places.dtype == torch.bfloat16


def test_equal_worth_and_a_weight() -> None:
    seen = collector(shared("llama"), magnitude=0.0, weight=4.0).see(WINDOWS)
    assert decoded(seen.codes["mlp"]).unique().tolist() == [0.0, 4.0]


def test_a_worth_beyond_a_byte_stays_wanted() -> None:
    rule = Rule("active", 1.0, 1.0)
    made = collector(shared("llama"))
    made.rules = {"mlp": rule}
    made._means["mlp", 0] = torch.tensor(1.0)
    coded = made._coded("mlp", 0, torch.tensor([[1e-30, 0.0, -1e30, 3.0]]))
    limits = torch.finfo(CODE)
    assert decoded(coded).tolist() == [[limits.smallest_normal, 0.0, limits.max, 3.0]]


def sensitivities(model: PreTrainedModel, matrix: str, layer: int, token: int) -> Tensor:
    """(channels,) how the first window's loss changes as a channel of a token grows by its own
    size, by differences of losses: large ones, since norms compute in float32."""
    of_layer = linear_layers(model.get_decoder().layers[layer], model.config)
    module = next(m for m, held in of_layer.items() if matrix in [name for name, _ in held])

    @torch.no_grad()
    def loss(channel: int, change: float) -> Tensor:
        def scale(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].clone()
            x.view(-1, x.shape[-1])[token, channel] *= 1 + change
            return (x,)

        handle = module.register_forward_pre_hook(scale)
        scores = model(WINDOWS[:1]).logits[0, :-1].log_softmax(dim=-1)
        handle.remove()
        return -scores.gather(1, WINDOWS[0, 1:, None]).sum()

    return torch.stack(
        [(loss(i, 0.01) - loss(i, -0.01)) / 0.02 for i in range(module.weight.shape[1])]
    )


@every_family
@pytest.mark.parametrize("frozen", [False, True])
def test_by_gradient_a_unit_is_worth_what_it_changes_the_loss(family: str, frozen: bool) -> None:
    model = tiny(family).requires_grad_(not frozen)
    rules: dict[Kind, Rule] = {
        "mlp": Rule(0.25, 1.0, 1.0, "gradient"),
        "head": Rule(0.4, 1.0, 1.0, "gradient"),
    }
    seen = Collector(Decoder(model), rules, 1, CPU).see(WINDOWS[:1])
    token, heads = 7, model.config.num_attention_heads
    for kind, matrix, layer in (("mlp", "down", 0), ("head", "o", 0), ("head", "o", 1)):
        changes = sensitivities(model, matrix, layer, token).abs()
        changes = changes.view(heads, -1).sum(dim=-1) if kind == "head" else changes
        coded = decoded(seen.codes[kind][layer, token]).double()
        wanted, k = coded != 0, round((0.25 if kind == "mlp" else 0.4) * len(changes))
        assert int(wanted.sum()) == min(k, int((changes > 1e-9).sum()))  # ReLU may leave fewer
        assert changes[wanted].min() > 0.9 * changes.topk(k).values.min()  # but for differences
        shares = changes[wanted] / changes[wanted].sum()
        torch.testing.assert_close(coded[wanted] / coded.sum(), shares, rtol=0.3, atol=0)
    assert not any(seen.codes["mlp"][:, -1].flatten())  # the last token has nothing to tell
    assert all(parameter.grad is None for parameter in model.parameters())


def test_room_of_a_token() -> None:
    made = collector(shared("llama"))
    seen = made.see(WINDOWS)
    held = [seen.places, *seen.codes.values()]
    assert sum(each.nbytes for each in held) == made.bytes_per_token * WINDOWS.numel()


def numbered(*tokens: int) -> Seen:
    """Tokens that carry their numbers."""
    numbers = torch.tensor(tokens)
    return Seen(numbers.half().expand(2, 1, -1).mT, {"mlp": numbers.byte().expand(3, 1, -1).mT})


def test_the_newest_tokens_replace_the_oldest() -> None:
    sample = Sample(5)
    sample.add(numbered(1, 2, 3))
    assert sample.tokens == 3
    sample.add(numbered(4, 5, 6, 7))
    assert sample.tokens == 5
    assert sample.places[0, :, 0].tolist() == [6, 7, 3, 4, 5]
    sample.add(numbered(8, 9, 10, 11))
    assert sample.places[1, :, 0].tolist() == [11, 7, 8, 9, 10]
    assert sample.codes["mlp"][2, :, 0].tolist() == [11, 7, 8, 9, 10]


def test_calls_hold_whole_windows() -> None:
    windows = list(WINDOWS.split(1))
    assert [len(call) for call in calls(windows, 45)] == [2, 1]
    assert [len(call) for call in calls(windows, 5)] == [1, 1, 1]
    assert torch.equal(torch.cat(list(calls(windows, 45))), WINDOWS)
