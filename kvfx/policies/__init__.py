"""The published methods, one file each, and the presets that command lines name."""

from __future__ import annotations

import difflib

from kvfx.errors import PolicyError
from kvfx.policies.ada_kv import AdaKV
from kvfx.policies.auto import Auto
from kvfx.policies.cache_blend import CacheBlend
from kvfx.policies.cache_latent import CacheLatent
from kvfx.policies.cake import CAKE
from kvfx.policies.cam import CaM
from kvfx.policies.chunk_kv import ChunkKV
from kvfx.policies.d2o import D2O
from kvfx.policies.dbudget_kv import DBudgetKV
from kvfx.policies.dynamic_kv import DynamicKV
from kvfx.policies.epic import EPIC
from kvfx.policies.exact_prefix import ExactPrefix
from kvfx.policies.expected_attention import ExpectedAttention
from kvfx.policies.full import Full
from kvfx.policies.h2o import H2O
from kvfx.policies.key_diff import KeyDiff
from kvfx.policies.kivi import KIVI
from kvfx.policies.knorm import KNorm
from kvfx.policies.kv_comm import KVCOMM
from kvfx.policies.kv_crush import KVCrush
from kvfx.policies.kv_merger import KVMerger
from kvfx.policies.kv_share import KVShare
from kvfx.policies.kv_tuner import KVTuner
from kvfx.policies.layer_budgets import LayerBudgets
from kvfx.policies.meda import MEDA
from kvfx.policies.naive_reuse import NaiveReuse
from kvfx.policies.parse import parse_policy
from kvfx.policies.per_layer import PerLayer
from kvfx.policies.prefix_kv import PrefixKV, PrefixTokens
from kvfx.policies.pyramid_kv import PyramidKV
from kvfx.policies.snapkv import SnapKV
from kvfx.policies.squeeze_attention import SqueezeAttention
from kvfx.policies.streaming_llm import StreamingLLM
from kvfx.policies.tova import TOVA
from kvfx.policies.uncomp import UNComp
from kvfx.policies.uniform import Uniform
from kvfx.policies.weighted_kv import WeightedKV
from kvfx.policies.window_ring import WindowRing
from kvfx.policies.xkv import XKV
from kvfx.policies.zip_vl import ZipVL
from kvfx.policy import Policy

METHODS: tuple[type[Policy], ...] = (
    Full,
    CacheLatent,
    KIVI,
    StreamingLLM,
    H2O,
    SnapKV,
    TOVA,
    KeyDiff,
    KNorm,
    ExpectedAttention,
    ChunkKV,
    KVCrush,
    AdaKV,
    KVMerger,
    CaM,
    D2O,
    WeightedKV,
    Uniform,
    PyramidKV,
    PrefixKV,
    PrefixTokens,
    XKV,
    DynamicKV,
    CAKE,
    SqueezeAttention,
    UNComp,
    MEDA,
    ZipVL,
    DBudgetKV,
    LayerBudgets,
    KVTuner,
    Auto,
    PerLayer,
    ExactPrefix,
    NaiveReuse,
    EPIC,
    CacheBlend,
    KVShare,
    KVCOMM,
)

PRESETS: dict[str, Policy] = {
    "full": Full(),
    "k8v4": KIVI(k_bits=8, v_bits=4),
    "kivi-8bit": KIVI(bits=8),
    "kivi-4bit": KIVI(bits=4),
    "kivi-2bit": KIVI(bits=2),
    "streaming-50%": StreamingLLM(budget=0.5),
    "streaming-25%": StreamingLLM(budget=0.25),
    "h2o-20%": H2O(budget=0.2),
    "snapkv-25%": SnapKV(budget=0.25),
    "keydiff-25%": KeyDiff(budget=0.25),
    "expected-25%": ExpectedAttention(budget=0.25),
    "chunkkv-25%": ChunkKV(budget=0.25),
    "snapkv-25%|kvcrush": SnapKV(budget=0.25) | KVCrush(),
    "snapkv-25%|adakv": SnapKV(budget=0.25) | AdaKV(),
    "kvmerger-50%": KVMerger(budget=0.5),
    "streaming-25%|k8v4": StreamingLLM(budget=0.25) | KIVI(k_bits=8, v_bits=4),
}

__all__ = [
    "CAKE",
    "D2O",
    "EPIC",
    "H2O",
    "KIVI",
    "KVCOMM",
    "MEDA",
    "METHODS",
    "PRESETS",
    "TOVA",
    "XKV",
    "AdaKV",
    "Auto",
    "CaM",
    "CacheBlend",
    "CacheLatent",
    "ChunkKV",
    "DBudgetKV",
    "DynamicKV",
    "ExactPrefix",
    "ExpectedAttention",
    "Full",
    "KNorm",
    "KVCrush",
    "KVMerger",
    "KVShare",
    "KVTuner",
    "KeyDiff",
    "LayerBudgets",
    "NaiveReuse",
    "PerLayer",
    "PrefixKV",
    "PyramidKV",
    "SnapKV",
    "SqueezeAttention",
    "StreamingLLM",
    "UNComp",
    "Uniform",
    "WeightedKV",
    "WindowRing",
    "ZipVL",
    "policy_named",
]


def policy_named(name: str) -> Policy:
    """The preset called `name`, or the policy that an expression such as `KIVI(bits=4)` spells.

    An unknown name raises a PolicyError with the nearest ones.
    """
    if name in PRESETS:
        return PRESETS[name]
    methods = {method.__name__: method for method in METHODS}
    if "(" in name or name in methods:
        return parse_policy(name, methods)
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"presets are {', '.join(PRESETS)}"
    )
    raise PolicyError(f"there is no policy {name!r}: {hint}")
