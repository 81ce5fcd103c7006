"""A tiny random model of every family, with every config flag on that changes the maths, and how exact it can be."""

from types import MethodType

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

COMMON = {
    "vocab_size": 42, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
SLIDING = {"sliding_window": 3}
GPT_2 = {
    "vocab_size": 42, "n_embd": 16, "n_inner": 24, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GPT_NEOX = COMMON | {"rotary_pct": 0.5, "attention_bias": True}
GEMMA_2 = COMMON | SLIDING | {
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "attention_bias": True,
}  # fmt: skip

CONFIGS = {
    "llama": ("llama", COMMON | {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", COMMON | {"tie_word_embeddings": True, "rope_scaling": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "mistral": ("mistral", COMMON | SLIDING),
    "qwen2": ("qwen2", COMMON | SLIDING | {
        "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3": ("qwen3", COMMON | SLIDING | {
        "attention_bias": True, "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gemma": ("gemma", COMMON | {"attention_bias": True}),
    "gemma2": ("gemma2", GEMMA_2),
    "gemma3_text": ("gemma3_text", GEMMA_2),
    "olmo2": ("olmo2", COMMON | {"attention_bias": True}),
    "phi3": ("phi3", COMMON | SLIDING | {"partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", GPT_2 | {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
    "gpt2, upcast": ("gpt2", GPT_2 | {"reorder_and_upcast_attn": True, "scale_attn_weights": False}),
    "gpt_neox, parallel": ("gpt_neox", GPT_NEOX | {"use_parallel_residual": True}),
    "gpt_neox, sequential": ("gpt_neox", GPT_NEOX | {"use_parallel_residual": False, "attention_bias": False}),
    "gpt_oss": ("gpt_oss", COMMON | SLIDING | {
        "attention_bias": True, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
}  # fmt: skip

LAYER_NORMS = ("gpt2", "gpt_neox, parallel", "gpt_neox, sequential")
"""These compute in float64 from end to end. All others but the next one are limited by their RMSNorm, which
transformers computes in float32 whatever the model's dtype. (Softmax in float32 is no limit: its result is held.)"""
NOT_IN_FLOAT64 = ("gpt2, upcast",)
"""Its attention is in float32 by that flag, and transformers refuses any other dtype."""


def tiny_model(name: str, seed: int = 0, **flags: object) -> PreTrainedModel:
    """The model of an entry of CONFIGS, with every parameter random: biases, norm gains and sinks too."""
    model_type, settings = CONFIGS[name]
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**settings | flags)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_gain = "norm" in parameter_name or ".ln_" in parameter_name
            if is_gain and parameter_name.endswith("weight"):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def with_wide_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Let every RMSNorm compute in its input's dtype: the same model, without what limits float64."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_gemma_norm if "Gemma" in type(module).__name__ else _norm, module)
    return model


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * module.weight


def _gemma_norm(module: nn.Module, x: Tensor) -> Tensor:
    """Stored gains are less one."""
    return x * (x.pow(2).mean(-1, keepdim=True) + module.eps).rsqrt() * (1 + module.weight)
