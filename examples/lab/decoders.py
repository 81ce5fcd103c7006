"""The last part of the transcoder's training: what features write is solved exactly, and then learns the answers."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from examples.lab.examples import Batch, encode
from examples.lab.invented import invented
from examples.lab.language_model import training_families
from examples.lab.learner import LearnerConfig
from examples.lab.measure import Lab
from examples.lab.transcoder import FINISH_SHARES, AnswerPlan, collect_sites, learn, site_weights
from transcoders import CrossLayerTranscoder
from transcoders.loss import error_scale

LAYERS = (0, 3, 4, 5)
"""Features of these layers write anew.

Those of the others recognise places, and swapping them is to move the answer as it does.
"""
RIDGE = 1e-3
"""How strongly decoders are held where they were, as a share of the mean square of an activation."""
PART_OF_THE_WAY = 0.4
"""How far decoders go towards the solution: what it leaves out decides more answers than what they had left out."""
SITES_AT_ONCE = 8192
DECODERS = LearnerConfig(steps=220, learning_rate=1.5e-4, dead_weight=0.0, bfloat16=True)
"""Slowly: at 1e-3 the noise of the steps undoes what was solved (relative error 0.029, not 0.027)."""
ANSWER_WEIGHT = 1.0
"""More than before: the error has become small."""
INVENTED = {"three-hop": 32}
"""Sequences of a step about names that nobody has, by the family that they are made of."""
SHARES = FINISH_SHARES | {"induction": 48, "three-hop": 48} | {f"{name}, invented": n for name, n in INVENTED.items()}
"""Sequences of each family in a step."""
N_INVENTED = 4000
"""Of each family."""


def finish_decoders(lab: Lab, transcoder: CrossLayerTranscoder, config: LearnerConfig) -> CrossLayerTranscoder:
    """Solve the decoders of `LAYERS`, and train them on for the replacement model's answers.

    When a feature fires, and how strongly, stays as it is; so do the decoders of the other layers.
    """
    sites = collect_sites(lab, config.seed)
    transcoder.requires_grad_(False)
    solved = solved_decoders(transcoder, sites.inputs, sites.outputs, site_weights(sites), LAYERS, config.error_floor)
    for layer, decoder in solved.items():
        transcoder.W_dec[layer].lerp_(decoder, PART_OF_THE_WAY).requires_grad_(True)
    families = training_families(lab.questions, lab.tokenizer) | _invented_families(lab, config.seed)
    return learn(lab, transcoder, sites, AnswerPlan(families, SHARES, ANSWER_WEIGHT), config)


@torch.no_grad()
def solved_decoders(
    transcoder: CrossLayerTranscoder,
    inputs: Float[Tensor, "layer site d_model"],
    outputs: Float[Tensor, "layer site d_model"],
    weight: Float[Tensor, " site"],
    layers: tuple[int, ...],
    error_floor: float,
) -> dict[int, Float[Tensor, "feature layer d_model"]]:
    """The decoders of `layers` that leave the least relative error, all else as it is (ridge regression).

    As features fire as they do this is linear: one system of equations for each layer that is written to. A site
    counts by its weight.
    """
    n_features, d_model = transcoder.config.n_features, transcoder.config.d_model
    counts = weight.to(outputs.dtype) / error_scale(outputs, error_floor)
    sources = [[layer for layer in layers if layer <= target] for target in range(transcoder.config.n_layers)]
    systems = [
        (torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, d_model, dtype=torch.float64))
        for n in (len(chosen) * n_features for chosen in sources)
    ]
    for block in torch.arange(inputs.shape[1]).split(SITES_AT_ONCE):
        activations = transcoder.encode(inputs[:, block])
        rest = outputs[:, block] - transcoder.decode(activations)
        for target, (chosen, (gram, moment)) in enumerate(zip(sources, systems, strict=True)):
            features = activations[list(chosen)].transpose(0, 1).flatten(1)
            counted = features * counts[target, block, None]
            gram += features.T @ counted
            moment += counted.T @ rest[target]
    solved = {layer: transcoder.W_dec[layer].clone() for layer in layers}
    for target, (chosen, (gram, moment)) in enumerate(zip(sources, systems, strict=True)):
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        change = torch.linalg.solve(gram, moment).to(outputs.dtype)
        for layer, part in zip(chosen, change.split(n_features), strict=True):
            solved[layer][:, target - layer] += part
    return solved


def _invented_families(lab: Lab, seed: int) -> dict[str, Batch]:
    """Training questions with names that nobody has, as token ids."""
    random = np.random.default_rng(seed + 12)
    families = {}
    for family in INVENTED:
        asked = [q for q in lab.questions if q.family == family and q.split == "train"]
        families[f"{family}, invented"] = encode(invented(asked, lab.tokenizer, N_INVENTED, random), lab.tokenizer)
    return families
