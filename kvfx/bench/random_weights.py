"""Models by their published shape with random weights: speed and memory need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvfx.errors import ModelNotFound
from kvfx.policies.parse import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Facts = dict[str, object]


def _llama3(factor: float) -> Facts:
    """The rotary embedding of Llama 3.1 and later, with its low frequencies stretched."""
    scaling: Facts = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "rope_parameters": scaling,
    }


def _rope(theta: float) -> Facts:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Facts:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


TIED: Facts = {"tie_word_embeddings": True}
UNTIED: Facts = {"tie_word_embeddings": False}

# name -> model type, and what the published config.json says about shapes
SHAPES: dict[str, tuple[str, Facts]] = {
    "llama-3.1-8b": ("llama", _sizes(4096, 14336, 32, 32, 8) | _llama3(8.0) | UNTIED),
    "llama-3.2-1b": (
        "llama",
        _sizes(2048, 8192, 16, 32, 8) | _llama3(32.0) | {"head_dim": 64} | TIED,
    ),
    "llama-3.2-3b": (
        "llama",
        _sizes(3072, 8192, 28, 24, 8) | _llama3(32.0) | {"head_dim": 128} | TIED,
    ),
    "qwen2.5-7b": (
        "qwen2",
        _sizes(3584, 18944, 28, 28, 4)
        | {"vocab_size": 152064, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6}
        | _rope(1e6)
        | UNTIED,
    ),
    "qwen3-8b": (
        "qwen3",
        _sizes(4096, 12288, 36, 32, 8)
        | {"vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6}
        | {"head_dim": 128}
        | _rope(1e6)
        | UNTIED,
    ),
    "mistral-7b-v0.3": (
        "mistral",
        _sizes(4096, 14336, 32, 32, 8)
        | {"vocab_size": 32768, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
        | {"head_dim": 128, "sliding_window": None}
        | _rope(1e6)
        | UNTIED,
    ),
    # for tests
    "tiny": (
        "llama",
        _sizes(128, 192, 2, 4, 2)
        | {"vocab_size": 99, "max_position_embeddings": 512}
        | _rope(1e4)
        | TIED,
    ),
}


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a row of `SHAPES`; raises ModelNotFound with the nearest name."""
    from transformers import AutoConfig

    if name not in SHAPES:
        raise ModelNotFound(f"--random-weights {name!r} is not known: {nearest(name, SHAPES)}")
    kind, facts = SHAPES[name]
    return AutoConfig.for_model(kind, **facts)


def without_weights(name: str) -> PreTrainedModel:
    """The model on the meta device: shapes and no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)


def random_model(name: str, device: torch.device, seed: int) -> PreTrainedModel:
    """The model in bf16 with seeded random weights, made where they stay: no copy elsewhere."""
    model = without_weights(name).to_empty(device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        # normal weights, norms of one, the frequencies of the rotation; tied where published so
        model.init_weights()
    return model.eval().requires_grad_(False)
