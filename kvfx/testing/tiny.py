"""Tiny models of real transformers classes with seeded weights: the table of architectures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB = 99
# the spread of the weights: wide enough that attention looks at some tokens and not at others
SPREAD = 0.2

# what most configurations call these facts
COMMON: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": SPREAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS: dict[str, object] = {"head_dim": 16}
FOUR_LAYERS: dict[str, object] = {"num_hidden_layers": 4}
# keys and values of all heads from 16 + 8 numbers; experts in the second layer, where there are any
LATENT: dict[str, object] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
LAYER_TYPES = ["sliding_attention", "full_attention"]

# model type -> what differs from COMMON
TINY: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {**HEADS, "sliding_window": None},
    "qwen2": {},
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": {
        **HEADS,
        "sliding_window": 16,
        "layer_types": LAYER_TYPES,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {
        **HEADS,
        **FOUR_LAYERS,
        "sliding_window": 16,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "phi": {},
    "phi3": {"sliding_window": None},
    "granite": {},
    "olmo2": {},
    "smollm3": FOUR_LAYERS,
    "starcoder2": {"sliding_window": None},
    "stablelm": {},
    "cohere": {"logit_scale": 1.0},
    "glm": {**HEADS, "partial_rotary_factor": 0.5},
    "gpt_neox": {},
    "opt": {"ffn_dim": 112, "word_embed_proj_dim": 64, "init_std": SPREAD},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "deepseek_v2": LATENT | {"head_dim": 8},
    "deepseek_v3": LATENT | {"head_dim": 8},
    "minicpm3": LATENT | {"scale_emb": 1.0, "scale_depth": 2.0, "tie_word_embeddings": False},
    "granite_swa": {"sliding_window": 16, "layer_types": LAYER_TYPES},
    "gpt_oss": {**HEADS, "sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def tiny(
    architecture: str, changes: Mapping[str, object] | None = None, seed: int = 0
) -> PreTrainedModel:
    """A tiny model of a row of `TINY`, fp32, in eval mode; `changes` are configuration fields."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture not in TINY:
        raise ValueError(f"{architecture!r} is not in the table: choose from {', '.join(TINY)}")
    facts = {**COMMON, **TINY[architecture], **(changes or {})}
    config = AutoConfig.for_model(architecture, **_known(architecture, facts))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def tiny_llama(
    kv_heads: int = 2, layers: int = 2, heads: int = 4, head_dim: int = 16
) -> PreTrainedModel:
    """A Llama: grouped-query attention with rotary embeddings and nothing else."""
    changes = {
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": head_dim,
    }
    return tiny("llama", changes)


def tiny_mistral(window: int | None = 16) -> PreTrainedModel:
    """A Mistral with a sliding window at every site."""
    return tiny("mistral", {"sliding_window": window})


def tiny_gemma3(window: int = 16, kv_heads: int = 1) -> PreTrainedModel:
    """A Gemma-3: three windowed layers and a global one, two rotary bases, query and key norms."""
    return tiny("gemma3_text", {"sliding_window": window, "num_key_value_heads": kv_heads})


def tiny_qwen3(kv_heads: int = 2) -> PreTrainedModel:
    """A Qwen-3: query and key norms before the rotation."""
    return tiny("qwen3", {"num_key_value_heads": kv_heads})


def tiny_gpt2(layers: int = 2) -> PreTrainedModel:
    """A GPT-2: learned positions, fused projections, no grouped heads."""
    return tiny("gpt2", {"n_layer": layers})


def tiny_phi3(window: int | None = None) -> PreTrainedModel:
    """A Phi-3: fused projections, and a sliding window where `window` is given."""
    return tiny("phi3", {"sliding_window": window})


def left_padded(lengths: Sequence[int], seed: int = 0, vocab: int = VOCAB) -> dict[str, Tensor]:
    """Random rows of these lengths: `input_ids`, `attention_mask` [B, max], padded at the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (len(lengths), max(lengths)), generator=generator)
    first = max(lengths) - torch.tensor(list(lengths))
    mask = torch.arange(max(lengths)) >= first[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def _known(architecture: str, facts: Mapping[str, object]) -> dict[str, object]:
    """The facts that the configuration of this architecture has under these names."""
    from transformers import AutoConfig

    names = set(dir(AutoConfig.for_model(architecture)))
    return {name: value for name, value in facts.items() if name in names}
