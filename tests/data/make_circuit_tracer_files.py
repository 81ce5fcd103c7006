"""Write tests/data/circuit-tracer with circuit-tracer itself: PEER/bin/python tests/data/make_circuit_tracer_files.py

PEER is an environment with circuit-tracer 0.5.0 and its TransformerLens. Nothing is downloaded: the model and the
transcoder are those of tests/data/llama-clt-jumprelu.
"""

import argparse
import gzip
import json
import struct
import zlib
from pathlib import Path

import torch
from circuit_tracer import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.utils import create_graph_files
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=Path, default=HERE / "llama-clt-jumprelu")
    parser.add_argument("--out", type=Path, default=HERE / "circuit-tracer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(exist_ok=True)
    case = options.case.resolve()
    record = json.loads((case / "case.json").read_text())
    model = replacement_model(case)
    graph = attribute(record["prompt"], model, max_n_logits=5, batch_size=32)
    graph.scan = "tests/llama-clt-jumprelu"
    graph.cfg.tokenizer_name = str(case / "model")
    create_graph_files(graph, "pruned", str(options.out), node_threshold=0.8, edge_threshold=0.98)
    create_graph_files(graph, "whole", str(options.out), node_threshold=1.0, edge_threshold=1.0)
    (options.out / "graph-metadata.json").unlink()
    graph.cfg.tokenizer_name = graph.cfg.model_name = "llama-clt-jumprelu"
    graph.to_pt(str(options.out / "graph.pt"))
    write_dashboards(options.out / "features")


def replacement_model(case: Path) -> TransformerLensReplacementModel:
    """The case's model and transcoder; circuit-tracer itself takes names on the Hub only."""
    transcoders, _ = load_transcoder_from_hub(str(case / "transcoder"), device=torch.device("cpu"), dtype=torch.float32)
    path = str(case / "model")
    llama = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    given = llama.config
    config = HookedTransformerConfig(
        n_layers=given.num_hidden_layers, d_model=given.hidden_size, n_heads=given.num_attention_heads,
        d_head=given.head_dim, d_mlp=given.intermediate_size, d_vocab=given.vocab_size, n_ctx=64,
        n_key_value_heads=given.num_key_value_heads, eps=given.rms_norm_eps, act_fn="silu", gated_mlp=True,
        normalization_type="RMS", final_rms=True, positional_embedding_type="rotary", rotary_dim=given.head_dim,
        rotary_base=given.rope_theta if hasattr(given, "rope_theta") else given.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False, original_architecture="LlamaForCausalLM", tokenizer_name=path, model_name=path,
        tokenizer_prepends_bos=False, dtype=torch.float32, device="cpu", init_weights=False,
    )  # fmt: skip
    model = TransformerLensReplacementModel(config, tokenizer=AutoTokenizer.from_pretrained(path))
    model.load_and_process_state_dict(
        convert_llama_weights(llama, config),
        fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    model._configure_replacement_model(transcoders)
    return model


def write_dashboards(folder: Path) -> None:
    """Two layers of records as circuit-tracer's viewer reads them: it has no code that makes them."""
    folder.mkdir(exist_ok=True)
    index = []
    for layer in range(2):
        offsets, content = [0], b""
        for feature in range(3):
            packed = zlib.compress(json.dumps(dashboard(layer, feature)).encode())
            content += struct.pack("<I", len(packed)) + packed
            offsets.append(len(content))
        (folder / f"layer_{layer}.bin").write_bytes(content)
        index.append({"filename": f"layer_{layer}.bin", "offsets": offsets})
    (folder / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode(), mtime=0))


def dashboard(layer: int, feature: int) -> dict:
    """One record: the feature fires on the last of three words."""
    example = {
        "tokens": ["w1", "w2", f"w{feature}"],
        "tokens_acts_list": [0.0, 0.0, 1.5 + layer],
        "train_token_ind": 2,
        "is_repeated_datapoint": False,
    }
    return {
        "transcoder_id": "tests/llama-clt-jumprelu",
        "index": feature,
        "examples_quantiles": [{"quantile_name": "Top activations", "examples": [example, example]}],
        "top_logits": ["w3", "w4"],
        "bottom_logits": ["w5"],
        "act_min": 0.0,
        "act_max": 1.5 + layer,
        "quantile_values": [0.5, 1.0],
        "histogram": [7, 2, 1],
        "activation_frequency": 0.25,
    }


if __name__ == "__main__":
    main()
