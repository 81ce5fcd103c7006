"""Swap what the model knows at the city's last token for what it knows of another city, and read the answer.

A model that hops from city to state to value must answer with the *donor state's* value of the *asked* attribute.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.lab.world import Question
from transcoders import CrossLayerTranscoder
from transcoders.activations import recording
from transcoders.families import dissect


@dataclass(frozen=True)
class Pairs:
    """Two-hop questions and donors with another place and another relation; right-padded prompts."""

    tokens: Int[Tensor, "pair position"]
    last: Int[Tensor, " pair"]
    city: Int[Tensor, " pair"]
    """Position of the city's last token."""
    donor_tokens: Int[Tensor, "pair position"]
    donor_city: Int[Tensor, " pair"]
    wanted: Int[Tensor, " pair"]
    """First token of the donor place's value of the asked relation."""
    place: tuple[str, ...]
    donor_place: tuple[str, ...]


def make_pairs(
    questions: list[Question], facts: dict[tuple[str, str], str], tokenizer: PreTrainedTokenizerFast, n: int, seed: int
) -> Pairs:
    """Pick `n` pairs whose two answers differ in their first token; `facts` gives the value of (place, relation)."""
    random = np.random.default_rng(seed)
    pairs: list[tuple[Question, Question]] = []
    while len(pairs) < n:
        ours, donor = (questions[i] for i in random.integers(len(questions), size=2))
        if ours.bridge == donor.bridge or ours.relation == donor.relation or ours.family != donor.family:
            continue
        wanted = facts[donor.bridge, ours.relation]
        firsts = {first_token(tokenizer, text) for text in (ours.answer, wanted, donor.answer)}
        if len(firsts) == 3:
            pairs.append((ours, donor))
    prompts, lengths = pad(tokenizer, [ours.prompt for ours, _ in pairs])
    donor_prompts, _ = pad(tokenizer, [donor.prompt for _, donor in pairs])
    return Pairs(
        prompts, lengths - 1,
        torch.tensor([subject_end(tokenizer, ours) for ours, _ in pairs]),
        donor_prompts,
        torch.tensor([subject_end(tokenizer, donor) for _, donor in pairs]),
        torch.tensor([first_token(tokenizer, facts[donor.bridge, ours.relation]) for ours, donor in pairs]),
        tuple(ours.bridge for ours, _ in pairs), tuple(donor.bridge for _, donor in pairs),
    )  # fmt: skip


@torch.no_grad()
def residual_swap(model: LlamaForCausalLM, pairs: Pairs, layer: int) -> float:
    """Share of answers that become the wanted ones when the residual stream after a layer is the donor's."""
    block = model.model.layers[layer]
    rows = torch.arange(len(pairs.tokens))
    with recording({"block": block}) as seen:
        model(pairs.donor_tokens)
    return _answers_with(model, pairs, layer, seen["block"][1][rows, pairs.donor_city])


@torch.no_grad()
def mean_residual_swap(
    model: LlamaForCausalLM, pairs: Pairs, layer: int, mean_of_place: dict[str, Float[Tensor, "layer d_model"]]
) -> float:
    """The same with the mean residual over all cities of the donor place: nothing of any single city is left."""
    donated = torch.stack([mean_of_place[place][layer] for place in pairs.donor_place])
    return _answers_with(model, pairs, layer, donated)


@torch.no_grad()
def mean_residuals(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[Question]
) -> dict[str, Float[Tensor, "layer d_model"]]:
    """Per place, the mean over questions of the residual stream after each layer at the city's last token."""
    tokens, _ = pad(tokenizer, [q.prompt for q in questions])
    ends = torch.tensor([subject_end(tokenizer, q) for q in questions])
    blocks = {str(i): block for i, block in enumerate(model.model.layers)}
    parts = []
    for rows in torch.arange(len(tokens)).split(512):
        with recording(blocks) as seen:
            model(tokens[rows])
        parts.append(torch.stack([seen[name][1][torch.arange(len(rows)), ends[rows]] for name in blocks], dim=1))
    residual = torch.cat(parts)
    places = np.array([q.bridge for q in questions])
    return {place: residual[torch.tensor(places == place)].mean(0) for place in dict.fromkeys(places.tolist())}


def _answers_with(model: LlamaForCausalLM, pairs: Pairs, layer: int, donated: Float[Tensor, "pair d_model"]) -> float:
    rows = torch.arange(len(pairs.tokens))

    def swap(module: torch.nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[rows, pairs.city] = donated
        return output

    handle = model.model.layers[layer].register_forward_hook(swap)
    try:
        answer = model(pairs.tokens).logits[rows, pairs.last].argmax(-1)
    finally:
        handle.remove()
    return float((answer == pairs.wanted).double().mean())


@torch.no_grad()
def feature_swap(
    model: LlamaForCausalLM,
    transcoder: CrossLayerTranscoder,
    pairs: Pairs,
    last_layer: int,
    leave: Bool[Tensor, "pair layer feature"],
    enter: Bool[Tensor, "pair layer feature"],
) -> float:
    """Share of answers that become the wanted ones when some features at the city's last token are swapped.

    `leave` are taken out at the activation they have, `enter` put in at the activation they have at the donor's city.
    MLP outputs up to `last_layer` are otherwise held (constrained patching), later layers run freely.
    """
    layers = dissect(model).layers
    ours, outputs = _city_features(model, transcoder, pairs.tokens, pairs.city)
    theirs, _ = _city_features(model, transcoder, pairs.donor_tokens, pairs.donor_city)
    change = theirs * enter.transpose(0, 1) - ours * leave.transpose(0, 1)
    change[last_layer + 1 :] = 0
    written = transcoder.decode(change) - transcoder.b_dec[:, None]
    rows = torch.arange(len(pairs.tokens))

    def patch(layer: int):
        def output(module: torch.nn.Module, arguments: tuple, output: Tensor) -> Tensor:
            output = output.clone()
            output[rows, pairs.city] = outputs[layer] + written[layer]
            return output

        return output

    handles = [layers[i].mlp.register_forward_hook(patch(i)) for i in range(last_layer + 1)]
    try:
        answer = model(pairs.tokens).logits[rows, pairs.last].argmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    return float((answer == pairs.wanted).double().mean())


def active_at_cities(
    model: LlamaForCausalLM, transcoder: CrossLayerTranscoder, pairs: Pairs
) -> tuple[Bool[Tensor, "pair layer feature"], Bool[Tensor, "pair layer feature"]]:
    """Which features fire at the city's last token, in the question and in the donor's."""
    ours, _ = _city_features(model, transcoder, pairs.tokens, pairs.city)
    theirs, _ = _city_features(model, transcoder, pairs.donor_tokens, pairs.donor_city)
    return (ours > 0).transpose(0, 1), (theirs > 0).transpose(0, 1)


@torch.no_grad()
def _city_features(
    model: LlamaForCausalLM, transcoder: CrossLayerTranscoder, tokens: Tensor, city: Tensor
) -> tuple[Float[Tensor, "layer pair feature"], Float[Tensor, "layer pair d_model"]]:
    layers = dissect(model).layers
    rows = torch.arange(len(tokens))
    with recording({str(i): layer.mlp for i, layer in enumerate(layers)}) as seen:
        model.model(tokens)
    inputs, outputs = (torch.stack([seen[name][side][rows, city] for name in seen]) for side in (0, 1))
    return transcoder.encode(inputs), outputs


def pad(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Right-padded token ids and their lengths."""
    ids = tokenizer(prompts)["input_ids"]
    tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int64)
    for row, sequence in enumerate(ids):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    return tokens, torch.tensor([*map(len, ids)])


def subject_end(tokenizer: PreTrainedTokenizerFast, question: Question) -> int:
    """Position of the subject's last token in the prompt; −1 where the prompt does not hold it as it stands."""
    prompt = tokenizer(question.prompt)["input_ids"]
    subject = tokenizer(question.subject, add_special_tokens=False)["input_ids"]
    n = len(subject)
    starts = [i for i in range(len(prompt) - n + 1) if prompt[i : i + n] == subject]
    return starts[0] + n - 1 if starts and n else -1


def first_token(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """The first token of an answer."""
    return tokenizer(text, add_special_tokens=False)["input_ids"][0]
