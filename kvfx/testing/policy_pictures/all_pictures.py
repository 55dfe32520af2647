"""The list of pictures: method in lower case -> what draws it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvfx.policies import (
    CAKE,
    D2O,
    EPIC,
    H2O,
    KIVI,
    MEDA,
    TOVA,
    XKV,
    AdaKV,
    Auto,
    CacheBlend,
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
)
from kvfx.policies.prefix_kv import PrefixTokens
from kvfx.testing.policy_pictures.across_prompts import AcrossPrompts, agents
from kvfx.testing.policy_pictures.by_layer import ByLayer, both, budgets, latents, precision
from kvfx.testing.policy_pictures.over_time import OverTime, Panel, heads, layers

FOLDER = Path(__file__).parents[3] / "docs" / "data" / "policies"
SNAP = SnapKV(budget=20, window=6, interval=8)
HITTERS = H2O(budget=20, interval=8)
COUNTED = {"kept": "entries kept per KV head"}
HELD = {"exact": "has an entry"}
GIVEN_AWAY = {"exact": "key held", "dropped": "key gone, value shared out with a probability"}

PICTURES: dict[str, Callable[[], str]] = {
    "full": OverTime([Panel(Full(), "KV head 0")]),
    "cachelatent": latents,
    "kivi": OverTime(
        [
            Panel(KIVI(bits=4, residual=32), 'mode="window"'),
            Panel(KIVI(bits=4, residual=32, mode="kivi"), 'mode="kivi"'),
        ],
        prompt=80,
        new=56,
    ),
    "streamingllm": OverTime([Panel(StreamingLLM(budget=20, interval=8), "all KV heads")]),
    "h2o": OverTime(heads(HITTERS)),
    "snapkv": OverTime(heads(SNAP)),
    "tova": OverTime(layers(TOVA(budget=20, interval=8))),
    "keydiff": OverTime(heads(KeyDiff(budget=20, interval=8))),
    "knorm": OverTime(heads(KNorm(budget=20, interval=8))),
    "expectedattention": OverTime(heads(ExpectedAttention(budget=20, interval=8))),
    "chunkkv": OverTime(layers(ChunkKV(budget=22, chunk=5, window=6, interval=8))),
    "kvcrush": OverTime(
        [Panel(SNAP, "without"), Panel(SNAP | KVCrush(ratio=0.5), "with KVCrush(ratio=0.5)")]
    ),
    "adakv": OverTime(heads(SNAP | AdaKV())),
    "kvmerger": OverTime(heads(KVMerger(budget=20, interval=8)), says=HELD),
    "cam": OverTime(heads(HITTERS | CaM(targets=4)), says=GIVEN_AWAY),
    "d2o": OverTime(heads(D2O(budget=20, interval=8, skip_layers=False)), says=HELD),
    "weightedkv": OverTime(
        heads(WeightedKV(budget=20, recent=8, interval=8)),
        says={"exact": "key held", "merged": "key gone, value taken in by the next entry"},
    ),
    "prefixtokens": OverTime(layers(PrefixTokens(budget=20, interval=8))),
    "zipvl": OverTime(layers(ZipVL(threshold=0.9, window=6, interval=8))),
    "dbudgetkv": OverTime(heads(DBudgetKV(threshold=0.05, skip_layers=False, interval=8))),
    "perlayer": OverTime(
        layers(
            PerLayer(
                default=SNAP,
                layers={0: Full(), -1: StreamingLLM(budget=20, interval=8, positions="absolute")},
            ),
            3,
        ),
        width=210,
        layers=3,
        title="PerLayer(default=SnapKV(budget=20, …), layers={0: Full(), -1: StreamingLLM(…)})",
    ),
    "uniform": budgets(Uniform(0.25)),
    "pyramidkv": budgets(PyramidKV(0.25)),
    "prefixkv": budgets(PrefixKV(0.25)),
    "xkv": budgets(XKV(0.25)),
    "dynamickv": budgets(DynamicKV(0.25)),
    "cake": budgets(CAKE(0.25)),
    "squeezeattention": budgets(SqueezeAttention(0.25)),
    "uncomp": budgets(UNComp(0.25)),
    "meda": budgets(MEDA(0.25)),
    "layerbudgets": budgets(LayerBudgets(0.25, (4, 3, 2, 2, 1, 1, 1, 2))),
    "kvtuner": ByLayer(
        KVTuner(3.25),
        precision,
        {"kept": "bits of keys", "values": "bits of values"},
        largest=8,
    ),
    "auto": ByLayer(Auto("900kB", context=1000), both, COUNTED, largest=1400),
    "exactprefix": AcrossPrompts(ExactPrefix(), order="ACBQ"),
    "naivereuse": AcrossPrompts(NaiveReuse()),
    "epic": AcrossPrompts(EPIC(k=3)),
    "cacheblend": AcrossPrompts(CacheBlend()),
    "kvshare": AcrossPrompts(KVShare(least=16, window=8), steps=4),
    "kvcomm": agents,
}
