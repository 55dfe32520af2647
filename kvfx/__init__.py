"""kvfx: a compiler that rewrites a decoder's attention onto a compressed KV cache."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfx.calibration import Calibration, calibrate
    from kvfx.compiler import compress, explain
    from kvfx.fit import plan
    from kvfx.plan_file import load_plan, save_plan
    from kvfx.policies import (
        CAKE,
        D2O,
        EPIC,
        H2O,
        KIVI,
        KVCOMM,
        MEDA,
        TOVA,
        XKV,
        AdaKV,
        Auto,
        CacheBlend,
        CacheLatent,
        CaM,
        ChunkKV,
        DBudgetKV,
        DynamicKV,
        ExactPrefix,
        ExpectedAttention,
        Full,
        KeyDiff,
        KNorm,
        KVCrush,
        KVMerger,
        KVShare,
        KVTuner,
        LayerBudgets,
        NaiveReuse,
        PerLayer,
        PrefixKV,
        PyramidKV,
        SnapKV,
        SqueezeAttention,
        StreamingLLM,
        UNComp,
        Uniform,
        WeightedKV,
        ZipVL,
        policy_named,
    )
    from kvfx.recommendation import recommend

__version__ = "0.1.0"
__all__ = [
    "CAKE",
    "D2O",
    "EPIC",
    "H2O",
    "KIVI",
    "KVCOMM",
    "MEDA",
    "TOVA",
    "XKV",
    "AdaKV",
    "Auto",
    "CaM",
    "CacheBlend",
    "CacheLatent",
    "Calibration",
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
    "ZipVL",
    "calibrate",
    "compress",
    "explain",
    "load_plan",
    "plan",
    "policy_named",
    "recommend",
    "save_plan",
]

# where a name lives that is not a policy
HOMES = {
    "Calibration": "kvfx.calibration",
    "calibrate": "kvfx.calibration",
    "compress": "kvfx.compiler",
    "explain": "kvfx.compiler",
    "load_plan": "kvfx.plan_file",
    "plan": "kvfx.fit",
    "recommend": "kvfx.recommendation",
    "save_plan": "kvfx.plan_file",
}


def __getattr__(name: str) -> object:
    """The public names, each imported when it is first asked for: `kvfx --help` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'kvfx' has no attribute {name!r}")
    value = getattr(importlib.import_module(HOMES.get(name, "kvfx.policies")), name)
    globals()[name] = value
    return value
