"""A tiny model for every model type that transformers maps to a causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from kvfx.testing.tiny import COMMON, SPREAD

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# what configurations call a fact that is not named as in COMMON, and facts of parts that only some
# models have: experts, low-rank projections, towers for images
FACTS: dict[str, object] = {
    **COMMON,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), 128),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size"), 128),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "decoder_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "num_hidden_layers_encoder"), 1),
    **dict.fromkeys(("n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads"), 4),
    "num_kv_heads": 2,
    **dict.fromkeys(("ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 112),
    **dict.fromkeys(("n_positions", "max_seq_len", "n_ctx"), 512),
    **dict.fromkeys(("initializer_range", "init_std"), SPREAD / 2),
    "vocab_size_per_layer_input": COMMON["vocab_size"],
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), 16),
    "rotary_dim": 8,
    "is_decoder": True,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "moe_shared_expert_intermediate_size": 32,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "v_head_dim": 32,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "mamba_d_state": 8,
    "image_size": 28,
    "patch_size": 14,
}
# keys that are expanded from a latent have as many heads as queries, and their own widths
LATENT: dict[str, object] = {"num_key_value_heads": 4, "head_dim": 8}
ROPE: dict[str, object] = {"rope_type": "default", "rope_theta": 10_000.0}
# model type -> what differs from FACTS; `...` leaves a field as its class has it
CHANGES: dict[str, Mapping[str, object]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8}},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "laurel_rank": 8,
    },
    "emu3": {"text_config": {"pad_token_id": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 32},
    "ministral": {"head_dim": 32},
    "prophetnet": {"num_hidden_layers": ..., "num_decoder_layers": 2, "num_encoder_layers": 1},
    "qwen4_exp": {"text_config": {"layer_types": ...}},
    "qwen4_exp_text": {"layer_types": ...},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [64, 64],
        "axial_pos_shape": [16, 32],
    },
    "xlnet": {"max_position_embeddings": ...},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 12},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


# model types whose configuration is of a larger model, around the one that is mapped
PARTS = {
    "dots3_note": "dots3_note_text",
    "musicgen": "musicgen_decoder",
    "musicgen_melody": "musicgen_melody_decoder",
}

DRAFTS = "it drafts for a larger model from that model's cache, and has none of its own"
# model types that are not built here, and why
UNBUILT = {
    "blt": "it cuts bytes into patches by their values, which no graph can",
    "gemma3n": "its tower for images needs the package timm: load the text model, gemma3n_text",
    "gemma4_assistant": DRAFTS,
    "gemma4_unified_assistant": DRAFTS,
}


def model_types() -> tuple[str, ...]:
    """The model types of the installed transformers that have a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def class_name(model_type: str) -> str:
    """The class of a model type's causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A small configuration of a model type."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[PARTS.get(model_type, model_type)]
    return _shrunk(kind, CHANGES.get(model_type, {}))


def tiny_architecture(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of a model type with seeded weights, fp32, in eval mode."""
    import transformers

    config = tiny_config(model_type)
    build = transformers.AutoModelForCausalLM.from_config
    if model_type in PARTS:
        build = getattr(transformers, class_name(model_type))._from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _shrunk(kind: type[PreTrainedConfig], changes: Mapping[str, object]) -> PreTrainedConfig:
    """A configuration of a class with the facts that it knows; its parts are shrunk alike."""
    from transformers import PreTrainedConfig

    base = kind()
    facts: dict[str, Any] = {n: value for n, value in FACTS.items() if _takes(base, n)}
    if _takes(base, "kv_lora_rank"):
        facts |= LATENT
    elif base.__dict__.get("head_dim") is not None and _takes(base, "head_dim"):
        facts["head_dim"] = 32
    parts = {name: x for name, x in base.__dict__.items() if isinstance(x, PreTrainedConfig)}
    for name, part in parts.items():
        given = changes.get(name, {})
        assert isinstance(given, Mapping)
        facts[name] = _shrunk(type(part), given).to_dict()
    kinds = list(dict.fromkeys(base.__dict__.get("layer_types") or ()))
    if len(kinds) == 2:
        facts["layer_types"] = kinds
    facts |= {name: value for name, value in changes.items() if name not in parts}
    return kind(**{name: value for name, value in facts.items() if value is not ...})


def _takes(config: PreTrainedConfig, name: str) -> bool:
    """Whether a configuration has a field of this name that can be given."""
    known = getattr(type(config), name, None)
    if isinstance(known, property) and known.fset is None:
        return False
    return name in config.__dict__ or name in config.attribute_map or known is not None
