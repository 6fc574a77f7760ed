"""The model card of a bundled model."""

import textwrap
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from training.evaluate import Evaluation

FRONT_MATTER = """\
---
language: en
license: apache-2.0
pipeline_tag: text-generation
library_name: dipnet
tags: [dipnet, sparse-inference, demo, int8]
datasets: [project-gutenberg, wikitext, roneneldan/TinyStories]
---
"""

DATA = """\
| text | share of the text | licence |
| --- | --- | --- |
| Project Gutenberg, English books without boilerplate | 96 % | public domain in the US |
| WikiText-2, training part, word-level release | 3 % | CC BY-SA |
| TinyStories, a part | 1 % | CDLA-Sharing-1.0 |

The weights are under Apache-2.0; the texts keep their own licences.
The books of the Gutenberg validation and test texts and the WikiText-2 validation and test
parts were not trained on.
"""

LIMITS = """\
This is a small model, made to show and to measure sparse inference. It writes text that looks
like English prose and often makes no sense. It knows no facts, follows no instructions and
repeats the views of its old books. Use it for nothing but demonstrations and tests.
"""


@dataclass(frozen=True)
class Scores:
    """One text's scores for the bundled int8 weights and for the float32 ones."""

    text: str
    compact: Evaluation
    original: Evaluation


def architecture(config: PreTrainedConfig) -> str:
    """Describe the architecture in one sentence."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    if config.model_type == "opt":
        family = f"OPTForCausalLM (ReLU, biases, pre-layer-norm), feed-forward {config.ffn_dim}"
    else:
        family = (
            f"LlamaForCausalLM (SwiGLU), feed-forward {config.intermediate_size}, "
            f"{config.num_key_value_heads} key-value heads"
        )
    return textwrap.fill(
        f"{family}; {layers} layers, hidden size {config.hidden_size}, {heads} heads, "
        f"vocabulary {config.vocab_size}, context {config.max_position_embeddings}, "
        "input embedding and output head tied.",
        width=96,
    )


def score_table(scores: list[Scores]) -> str:
    """Return the table of held-out scores."""
    lines = [
        "| text | tokens scored | perplexity, int8 (bundled) | perplexity, float32 "
        "| bits per byte, int8 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for score in scores:
        lines.append(
            f"| {score.text} | {score.compact.tokens:,} | {score.compact.perplexity:.2f} "
            f"| {score.original.perplexity:.2f} | {score.compact.bits_per_byte:.3f} |"
        )
    return "\n".join(lines) + "\n"


def model_card(
    name: str, config: PreTrainedConfig, about: dict[str, Any], scores: list[Scores], machine: str
) -> str:
    """Return the card as Markdown."""
    context = config.max_position_embeddings
    tokens, unique = about["tokens_seen"] / 1e6, about["unique_tokens"] / 1e6
    return f"""{FRONT_MATTER}
# dipnet demo model: {name}

{architecture(config)}
{about["parameters"]:,} parameters. Weights are int8 with one float32 scale a row
(`weight = int8 * scale`); vectors are float32. dipnet loads this format.

## Training data and its licences

{DATA}
## Training

{about["steps"]:,} steps of {about["tokens_per_step"]:,} tokens: {tokens:,.0f} M tokens seen,
{about["passes"]:.1f} passes over {unique:.1f} M unique tokens.
{about["seconds"] / 60:.1f} minutes on {machine}, compiling included.
{about["optimizer"]}, bf16 autocast, seed {about["seed"]}.
Final training loss {about["final_training_loss"]:.3f} nats a token.
The scripts and the commands are in dipnet's `training/` folder.

## Held-out perplexity

{score_table(scores)}
Protocol: the raw text of the whole file, no beginning-of-text token; windows of {context} tokens
that do not overlap, the first token of each window not scored; float32 arithmetic. Perplexity is
per token of this model's own vocabulary; bits per byte can be compared across vocabularies.

## Limits

{LIMITS}"""
