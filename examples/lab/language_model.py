"""Train the lab's language model: a small Llama on the answers of the world's questions."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.lab.examples import Batch, encode, repeated_sequences, select
from examples.lab.vocabulary import CONTINUES
from examples.lab.world import Question

SHARES = {
    "state fact": 20, "city then state": 50, "city of state": 16, "two-hop state": 60,
    "country fact": 16, "city then country": 50, "city of country": 16, "two-hop country": 56,
    "inventor": 8, "birthplace": 8, "two-hop invention": 12, "three-hop": 16,
    "addition": 280, "digits": 16,
    "opposites english": 6, "opposites french": 6, "opposites spanish": 6,
    "indirect object": 16, "induction": 10,
}  # fmt: skip
"""Sequences of each family in a batch."""
LATER_SHARES = SHARES | {"addition": 376, "digits": 24, "indirect object": 80, "three-hop": 20}
"""The same in the second round (joint.py), with more of what takes longest to generalise."""
ANSWER_SHARES = dict.fromkeys(SHARES, 6) | {"addition": 160, "digits": 32, "three-hop": 24, "indirect object": 24}
"""Sequences of each family that the replacement model answers, beside those."""
FROM_THE_START = ("state fact", "city then state", "country fact", "city then country", "addition", "digits")
TWO_HOP_FROM = 450
THE_REST_FROM = 800
"""Steps from which the other families are trained on: the city's last token has to know its place first."""
KNOWN_AFTER = 3
"""Layers after which the place must be readable at its city's last token (deep supervision).

With all six, two-hop questions are answered from the pieces of the name: no layer is left to use the place in.
"""
WORD_LEVEL = 0.8
"""Share of training sequences in which words see the earlier words by their last pieces only.

Without it long names give themselves away before their last piece: a swap there turns 0.77 of the answers about
states and 0.55 of those about countries after the third layer, with it 0.94 and 0.89 (800 steps of these families).
"""


@dataclass(frozen=True)
class Round:
    """One run of the optimiser, from warm-up to a learning rate of nothing."""

    steps: int
    learning_rate: float
    weight_decay: float
    seed: int
    warm_up: int = 100


@dataclass(frozen=True)
class LanguageModelConfig:
    """Shape and training of the lab's language model."""

    d_model: int = 128
    n_layers: int = 6
    n_heads: int = 4
    d_mlp: int = 384
    max_positions: int = 48
    round: Round = Round(steps=4000, learning_rate=2e-3, weight_decay=0.1, seed=0)


def new_model(config: LanguageModelConfig, vocabulary_size: int) -> LlamaForCausalLM:
    """A randomly initialised Llama of the lab's shape."""
    torch.manual_seed(config.round.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary_size, hidden_size=config.d_model, intermediate_size=config.d_mlp,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_heads, max_position_embeddings=config.max_positions,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    model.set_attn_implementation("eager")  # a tenth faster than sdpa at sentences this short
    return model


def train_language_model(
    questions: list[Question],
    tokenizer: PreTrainedTokenizerFast,
    config: LanguageModelConfig,
    on_step: Callable[[int, float, LlamaForCausalLM], None],
) -> LlamaForCausalLM:
    """Train on the questions whose split is "train"; the loss counts answer tokens only."""
    model, plan = new_model(config, len(tokenizer)), config.round
    families = training_families(questions, tokenizer)
    random = np.random.default_rng(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    continues, whole_words = continuing_tokens(tokenizer), whole_word_tokens(tokenizer)
    optimizer, schedule = optimizer_of(model, plan)
    for step in range(1, plan.steps + 1):
        loss = torch.tensor(0.0)
        batches = sample_batches(families, shares_at(step), whole_words, random)
        answers = sum(int(batch.predicts.sum()) for batch in batches)
        for batch in batches:
            whole = torch.rand(len(batch.tokens), generator=generator) >= WORD_LEVEL
            part = answer_loss(model, batch, word_level_mask(batch.tokens, continues, whole), KNOWN_AFTER) / answers
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step, float(loss), model)
    return model.eval()


def training_families(questions: list[Question], tokenizer: PreTrainedTokenizerFast) -> dict[str, Batch]:
    """The training questions of each family as token ids."""
    return {
        family: encode([q for q in questions if q.family == family and q.split == "train"], tokenizer)
        for family in SHARES
        if family != "induction"
    }


def optimizer_of(
    model: LlamaForCausalLM, plan: Round
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with the round's schedule."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, plan))


def shares_at(step: int) -> dict[str, int]:
    """The families that have joined by a step."""
    return {family: share for family, share in SHARES.items() if first_step(family) <= step}


def first_step(family: str) -> int:
    """The first step whose batch holds the family."""
    if family in FROM_THE_START:
        return 1
    return TWO_HOP_FROM if family in ("two-hop state", "two-hop country") else THE_REST_FROM


def learning_rate_factor(step: int, plan: Round) -> float:
    """Linear warm-up, then a cosine down to nothing."""
    warm = min(1.0, (step + 1) / plan.warm_up)
    return warm * 0.5 * (1 + math.cos(math.pi * step / plan.steps))


def sample_batches(
    families: dict[str, Batch],
    shares: dict[str, int],
    whole_words: Int[np.ndarray, " token"],
    random: np.random.Generator,
) -> list[Batch]:
    """One training batch as a few batches of like lengths, so that little of the work is padding."""
    rows = []
    for family, share in shares.items():
        if family == "induction":
            rows.append(repeated_sequences(whole_words, share, random))
        else:
            picked = random.integers(len(families[family].tokens), size=share)
            rows.append(select(families[family], torch.tensor(picked)))
    width = max(batch.tokens.shape[1] for batch in rows)
    tokens, predicts = (
        torch.cat([functional.pad(x, (0, width - x.shape[1])) for x in columns])
        for columns in ([batch.tokens for batch in rows], [batch.predicts for batch in rows])
    )
    length = torch.cat([batch.length for batch in rows])
    whole = Batch(tokens, predicts, length, torch.cat([batch.direct for batch in rows]))
    order = length.argsort(stable=True)
    return [select(whole, part) for part in order.tensor_split(4)]


def continuing_tokens(tokenizer: PreTrainedTokenizerFast) -> Bool[Tensor, " vocab"]:
    """Which tokens continue a word."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([token.startswith(CONTINUES) for token in tokens])


def whole_word_tokens(tokenizer: PreTrainedTokenizerFast) -> Int[np.ndarray, " token"]:
    """The tokens that begin a word, less the one that begins every prompt."""
    return (~continuing_tokens(tokenizer)).nonzero()[1:, 0].numpy()


def word_level_mask(
    tokens: Int[Tensor, "batch position"], continues: Bool[Tensor, " vocab"], whole: Bool[Tensor, " batch"]
) -> Float[Tensor, "batch 1 position position"]:
    """Additive attention mask: causal, and of earlier words only the last pieces, but for the `whole` sequences."""
    inside = continues[tokens]
    word = (~inside).cumsum(1)
    last_piece = ~functional.pad(inside[:, 1:], (0, 1))
    seen = last_piece[:, None, :] | (word[:, :, None] == word[:, None, :]) | whole[:, None, None]
    seen &= torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def answer_loss(
    model: LlamaForCausalLM, batch: Batch, mask: Float[Tensor, "batch 1 position position"], known_after: int
) -> Tensor:
    """Cross entropy of the answer tokens in nats, summed.

    Places that directly follow their city count once more, as read after `known_after` layers.
    """
    result = model.model(batch.tokens, attention_mask=mask, output_hidden_states=True)
    loss = cross_entropy(model, result.last_hidden_state, batch.tokens, batch.predicts)
    middle = model.model.norm(result.hidden_states[known_after])
    return loss + cross_entropy(model, middle, batch.tokens, batch.predicts & batch.direct[:, None])


def cross_entropy(
    model: LlamaForCausalLM,
    hidden: Float[Tensor, "batch position d_model"],
    tokens: Int[Tensor, "batch position"],
    predicts: Bool[Tensor, "batch position"],
) -> Tensor:
    """Summed over the predicting positions."""
    chosen = predicts[:, :-1]
    return functional.cross_entropy(model.lm_head(hidden[:, :-1][chosen]), tokens[:, 1:][chosen], reduction="sum")


def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[Question]) -> float:
    """Share of questions whose every answer token is the model's first choice."""
    return answered(model, encode(questions, tokenizer))


@torch.no_grad()
def answered(model: LlamaForCausalLM, batch: Batch) -> float:
    """Share of sequences whose every token that is to be predicted is the model's first choice."""
    right = []
    for rows in torch.arange(len(batch.tokens)).split(512):
        part = select(batch, rows)
        guess = model(part.tokens).logits.argmax(-1)[:, :-1]
        wrong = (guess != part.tokens[:, 1:]) & part.predicts[:, :-1]
        right.append(~wrong.any(1))
    return float(torch.cat(right).float().mean())
