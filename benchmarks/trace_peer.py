"""Trace one benchmark case with circuit-tracer 0.5.0 and print what it took, as JSON: runs in the peer's environment.

Imports nothing of this package but how to measure. circuit-tracer takes a local Llama only through TransformerLens with
a configuration made by hand; nothing is folded or centred, so its edges are those of the plain model.
"""

import argparse
import json
import os
from pathlib import Path

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[name] = "1"

# ruff: noqa: E402 (the peer reads these settings when it is imported)
import numpy as np
import torch
from circuit_tracer import attribute
from circuit_tracer.graph import prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import now, peak_mb


def main() -> None:
    """Load, attribute `--repeats` times, prune, and describe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=Path)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--edges", type=Path, help="Write the dense adjacency here (.npz).")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompt = json.loads((options.case / "prompt.json").read_text())["prompt"]
    transcoder, _ = load_transcoder_from_hub(
        str((options.case / "transcoder").resolve()), device=torch.device(options.device),
        dtype=getattr(torch, options.dtype),
    )  # fmt: skip
    model = _model(options.case / "model", transcoder, options.device, getattr(torch, options.dtype))
    attribution, pruning = [], []
    for _ in range(options.repeats):
        graph = pruned = None  # or the last one would count in the peak
        start = now(options.device)
        graph = attribute(prompt, model, max_n_logits=10, desired_logit_prob=0.95, batch_size=options.batch_size)
        attribution.append(now(options.device) - start)
        start = now(options.device)
        pruned = prune_graph(graph, 0.8, 0.98)
        pruning.append(now(options.device) - start)
    if options.edges:
        np.savez(
            options.edges, features=graph.active_features.cpu().numpy(),
            adjacency=graph.adjacency_matrix.float().cpu().numpy(), kept=pruned.node_mask.cpu().numpy(),
            n_logits=len(graph.logit_targets), n_layers=model.cfg.n_layers,
        )  # fmt: skip
    print(
        json.dumps(
            {
                "active": len(graph.active_features), "attribution_seconds": attribution, "pruning_seconds": pruning,
                "kept_nodes": int(pruned.node_mask.sum()), "peak_mb": peak_mb(options.device),
            }
        )
    )  # fmt: skip


def _model(folder: Path, transcoder, device: str, dtype: torch.dtype) -> TransformerLensReplacementModel:
    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()
    c, path = network.config, str(folder)
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_heads=c.num_attention_heads, d_head=c.head_dim,
        n_key_value_heads=c.num_key_value_heads, d_mlp=c.intermediate_size, d_vocab=c.vocab_size,
        n_ctx=c.max_position_embeddings, eps=c.rms_norm_eps, act_fn="silu", gated_mlp=True, normalization_type="RMS",
        final_rms=True, positional_embedding_type="rotary", rotary_dim=c.head_dim, rotary_adjacent_pairs=False,
        rotary_base=10000, original_architecture="LlamaForCausalLM", tokenizer_name=path, model_name=path,
        tokenizer_prepends_bos=False, dtype=dtype, device=device, init_weights=False,
    )  # fmt: skip
    model = TransformerLensReplacementModel(config, tokenizer=AutoTokenizer.from_pretrained(path))
    model.load_and_process_state_dict(
        convert_llama_weights(network, config),
        fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    model._configure_replacement_model(transcoder)
    return model


if __name__ == "__main__":
    main()
