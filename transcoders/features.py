"""The inventory: what each feature fires on and promotes, measured on a set of prompts."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.sparse import csr_array
from torch import Tensor
from transformers import PreTrainedModel

from transcoders.activations import mlp_activations
from transcoders.families import dissect
from transcoders.model import CrossLayerTranscoder

N_EXAMPLES = 5
N_PROMOTED = 8
N_BINS = 20


@dataclass(frozen=True)
class Firing:
    """Every activation of every feature at every token site of some prompts."""

    prompt: Int[ndarray, " site"]
    position: Int[ndarray, " site"]
    activation: tuple[csr_array, ...]
    """Per layer a sparse matrix (feature, site)."""


@torch.no_grad()
def collect_firing(
    model: PreTrainedModel,
    transcoder: CrossLayerTranscoder,
    tokens: Int[Tensor, "prompt position"],
    keep: Bool[Tensor, "prompt position"],
    batch_size: int = 256,
) -> Firing:
    """Run the prompts and keep what fired; sites are the kept tokens, prompt by prompt."""
    prompt, position = (index.numpy() for index in keep.nonzero(as_tuple=True))
    columns: list[list[Tensor]] = [[] for _ in range(transcoder.config.n_layers)]
    first_site = 0
    for rows in torch.arange(len(tokens)).split(batch_size):
        inputs, _ = mlp_activations(model, tokens[rows], keep[rows], transcoder.config.reads)
        for layer, activation in enumerate(transcoder.encode(inputs)):
            site, feature = activation.nonzero(as_tuple=True)
            values = activation[site, feature]
            columns[layer].append(torch.stack([site.double() + first_site, feature.double(), values.double()]))
        first_site += inputs.shape[1]
    matrices = []
    for parts in columns:
        site, feature, value = torch.cat(parts, dim=1).numpy()
        shape = (transcoder.config.n_features, len(prompt))
        matrices.append(csr_array((value, (feature.astype(int), site.astype(int))), shape=shape))
    return Firing(prompt, position, tuple(matrices))


@torch.no_grad()
def promoted_tokens(
    model: PreTrainedModel, transcoder: CrossLayerTranscoder, layer: int
) -> tuple[Float[Tensor, "feature k"], Int[Tensor, "feature k"], Float[Tensor, "feature k"], Int[Tensor, "feature k"]]:
    """Tokens that a layer's features raise and lower most, straight through the final norm's gain.

    Values are logits per unit of activation at norm scale 1, less the mean over the vocabulary.
    """
    anatomy = dissect(model)
    rows = transcoder.decoder_rows(layer, torch.arange(transcoder.config.n_features))
    direction = rows.sum(1) * anatomy.final_norm.get_parameter("weight")
    effect = direction @ anatomy.unembedding.weight.T
    effect = effect - effect.mean(1, keepdim=True)
    top, bottom = effect.topk(N_PROMOTED), effect.topk(N_PROMOTED, largest=False)
    return top.values, top.indices, bottom.values, bottom.indices


def feature_records(
    firing: Firing, layer: int, prompts: list[list[str]], promoted: tuple, vocabulary: list[str]
) -> list[dict]:
    """One record per feature of a layer, in the columns of the store's `features` table less its labels."""
    matrix = firing.activation[layer]
    top_value, top_id, bottom_value, bottom_id = (x.tolist() for x in promoted)
    n_sites = len(firing.prompt)
    records = []
    for feature in range(len(matrix.indptr) - 1):
        span = slice(matrix.indptr[feature], matrix.indptr[feature + 1])
        sites, values = matrix.indices[span], matrix.data[span]
        records.append(
            {
                "layer": layer,
                "feature": feature,
                "density": len(values) / n_sites,
                "max_activation": float(values.max()) if len(values) else 0.0,
                "top_logits": _pairs(top_id[feature], top_value[feature], vocabulary),
                "bottom_logits": _pairs(bottom_id[feature], bottom_value[feature], vocabulary),
                "examples": _examples(firing, matrix, feature, sites, values, prompts),
                "histogram": _histogram(values),
            }
        )
    return records


def _examples(
    firing: Firing, matrix: csr_array, feature: int, sites: ndarray, values: ndarray, prompts: list[list[str]]
) -> list[dict]:
    """The strongest activations, one per prompt, with the activations at the prompt's other tokens."""
    examples, seen = [], set()
    for i in np.argsort(-values, kind="stable"):
        prompt = int(firing.prompt[sites[i]])
        if prompt in seen:
            continue
        seen.add(prompt)
        here = firing.prompt[sites] == prompt
        activations = np.zeros(len(prompts[prompt]), dtype=np.float32)
        activations[firing.position[sites[here]]] = values[here]
        examples.append(
            {"tokens": prompts[prompt], "activations": activations.tolist(), "position": int(firing.position[sites[i]])}
        )
        if len(examples) == N_EXAMPLES:
            break
    return examples


def _histogram(values: ndarray) -> list[int]:
    if len(values) == 0:
        return [0] * N_BINS
    return np.histogram(values, bins=N_BINS, range=(0, float(values.max())))[0].tolist()


def _pairs(ids: list[int], values: list[float], vocabulary: list[str]) -> list[dict]:
    return [{"token": vocabulary[i], "value": value} for i, value in zip(ids, values, strict=True)]
