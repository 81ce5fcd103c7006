"""Train the lab's transcoder, and take the inventory of its features."""

import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional

from examples.lab.examples import encode
from examples.lab.language_model import SHARES, sample_batches
from examples.lab.measure import Lab
from examples.lab.situations import tags_of
from examples.lab.swaps import pad, subject_end
from examples.lab.world import Question
from graphs.schema import tables
from transcoders import CrossLayerTranscoder, TrainConfig, TranscoderConfig, train
from transcoders.features import Firing, collect_firing, feature_records, promoted_tokens
from transcoders.labels import Label, label_by_firing, situations_of
from transcoders.train import TokenBatch

N_FEATURES = 1024
K = 12
SUBJECT, LAST, OTHER = range(3)


def train_lab_transcoder(lab: Lab, config: TrainConfig) -> CrossLayerTranscoder:
    """Train on the prompts and answers of the training questions of every family."""
    model = lab.model.requires_grad_(False)
    shape = TranscoderConfig(
        n_layers=model.config.num_hidden_layers, d_model=model.config.hidden_size, n_features=N_FEATURES,
        activation="topk", k=K, reads="mlp.hook_in", writes="hook_mlp_out", model_name="lab",
    )  # fmt: skip
    start = time.time()

    def on_step(step: int, error: float, transcoder: CrossLayerTranscoder) -> None:
        if step % 50 == 0 or step == 1:
            print(f"step {step}  {time.time() - start:.0f} s  relative error {error:.4f}", flush=True)

    return train(model, _token_batches(lab, config), shape, config, on_step=on_step)


def _token_batches(lab: Lab, config: TrainConfig) -> Iterator[TokenBatch]:
    """Training questions in the proportions of the language model's training."""
    families = {
        family: encode([q for q in lab.questions if q.family == family and q.split == "train"], lab.tokenizer)
        for family in SHARES
        if family != "induction"
    }
    random = np.random.default_rng(config.seed + 1)
    while True:
        parts = sample_batches(families, SHARES, len(lab.tokenizer), random)
        width = max(part.tokens.shape[1] for part in parts)
        tokens = torch.cat([functional.pad(part.tokens, (0, width - part.tokens.shape[1])) for part in parts])
        rows = torch.tensor(random.permutation(len(tokens)))
        length = torch.cat([part.length for part in parts])
        for chosen in rows.tensor_split(2):
            yield tokens[chosen], distinct_prefixes(tokens[chosen], length[chosen])


def distinct_prefixes(
    tokens: Int[Tensor, "batch position"], length: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch position"]:
    """One site for every distinct prefix after the first token: the same prefix gives the same activations."""
    seen: set[tuple[int, ...]] = set()
    keep = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (sequence, n) in enumerate(zip(tokens.tolist(), length.tolist(), strict=True)):
        for position in range(1, n):
            prefix = tuple(sequence[: position + 1])
            if prefix not in seen:
                seen.add(prefix)
                keep[row, position] = True
    return keep


def inventory(lab: Lab, transcoder: CrossLayerTranscoder, name: str, per_family: int = 2500) -> pa.Table:
    """The `features` table: examples, promoted tokens, density, and labels from the world's own situations."""
    random = np.random.default_rng(5)
    chosen: list[Question] = []
    for family in dict.fromkeys(q.family for q in lab.questions):
        pool = [q for q in lab.questions if q.family == family]
        chosen += [pool[i] for i in random.permutation(len(pool))[:per_family]]
    tokens, lengths = pad(lab.tokenizer, [q.prompt for q in chosen])
    place = torch.arange(tokens.shape[1])
    firing = collect_firing(lab.model, transcoder, tokens, (place < lengths[:, None]) & (place > 0))
    prompts = [token_texts(lab, ids[:n].tolist()) for ids, n in zip(tokens, lengths, strict=True)]
    vocabulary = token_texts(lab, list(range(len(lab.tokenizer))))
    tags = [tags_of(question, lab.tokenizer) for question in chosen]
    site_tags = [tags[prompt][position] for prompt, position in zip(firing.prompt, firing.position, strict=True)]
    kinds = _site_kinds(lab, chosen, lengths, firing)
    records = []
    for layer in range(transcoder.config.n_layers):
        promoted = promoted_tokens(lab.model, transcoder, layer)
        rows = feature_records(firing, layer, prompts, promoted, vocabulary)
        labels = _labels(firing, layer, site_tags, kinds)
        for row, label in zip(rows, labels, strict=True):
            records.append(row | {"transcoder": name} | _label_columns(row, label))
    return pa.Table.from_pylist(records, schema=tables()["features"])


def token_texts(lab: Lab, ids: list[int]) -> list[str]:
    """Tokens as text, one by one."""
    return [str(token) for token in lab.tokenizer.convert_ids_to_tokens(ids)]


def _site_kinds(lab: Lab, chosen: list[Question], lengths: torch.Tensor, firing: Firing) -> np.ndarray:
    """Whether each site is a subject's last token, a prompt's last token, or another."""
    ends = np.array([subject_end(lab.tokenizer, q) for q in chosen])
    kinds = np.full(len(firing.prompt), OTHER)
    kinds[firing.position == ends[firing.prompt]] = SUBJECT
    kinds[firing.position == lengths.numpy()[firing.prompt] - 1] = LAST
    return kinds


def _labels(
    firing: Firing, layer: int, site_tags: list[list[tuple[str, str]]], kinds: np.ndarray
) -> list[Label | None]:
    """Each feature is named after what holds at the kind of site where most of its activation falls."""
    matrix = firing.activation[layer].tocsc()
    mass = np.stack([np.asarray(matrix[:, kinds == kind].sum(axis=1)).ravel() for kind in (SUBJECT, LAST, OTHER)])
    home = mass.argmax(0)
    labels: list[Label | None] = [None] * len(home)
    for kind in (SUBJECT, LAST, OTHER):
        sites = np.flatnonzero(kinds == kind)
        found = label_by_firing(matrix[:, sites].tocsr(), situations_of([site_tags[i] for i in sites]))
        for feature in np.flatnonzero((home == kind) & (mass.max(0) > 0)):
            labels[feature] = found[feature]
    return labels


def _label_columns(row: dict, label: Label | None) -> dict:
    """The label, or else what the feature promotes, marked as such."""
    if label is not None:
        return {"label": label.text, "label_source": "fires on", "label_precision": label.precision,
                "label_recall": label.recall}  # fmt: skip
    if row["max_activation"] == 0:
        return {"label": None, "label_source": None, "label_precision": None, "label_recall": None}
    promoted = ", ".join(entry["token"] for entry in row["top_logits"][:2])
    return {"label": f"→ {promoted}", "label_source": "promotes", "label_precision": None, "label_recall": None}
