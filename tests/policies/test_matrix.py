"""What holds for every method that drops or merges entries, for every grouping of heads, alone and
in a left-padded batch.

The oracle of the kept entries is the dense cache of the same model: each kept entry is found in it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import pytest
import torch
from torch import Tensor

import kvfx
from kvfx import (
    D2O,
    H2O,
    KIVI,
    TOVA,
    AdaKV,
    CaM,
    ChunkKV,
    ExpectedAttention,
    Full,
    KeyDiff,
    KNorm,
    KVCrush,
    KVMerger,
    SnapKV,
    StreamingLLM,
    WeightedKV,
)
from kvfx.ops import overload
from kvfx.policy import Policy, Select
from kvfx.testing.tiny import left_padded, tiny_gemma3, tiny_llama

BUDGET, INTERVAL = 14, 4
SNAPKV = SnapKV(budget=BUDGET, window=5, pool=3, interval=INTERVAL)
HITTERS = H2O(budget=BUDGET, interval=INTERVAL)
EVICTING: dict[str, Policy] = {
    "streaming": StreamingLLM(budget=BUDGET, interval=INTERVAL, positions="absolute"),
    "h2o": HITTERS,
    "snapkv": SNAPKV,
    "tova": TOVA(budget=BUDGET, interval=INTERVAL),
    "keydiff": KeyDiff(budget=BUDGET, sinks=1, recent=2, interval=INTERVAL),
    "knorm": KNorm(budget=BUDGET, interval=INTERVAL),
    "expected": ExpectedAttention(budget=BUDGET, sinks=2, future=16, interval=INTERVAL),
    "chunkkv": ChunkKV(budget=BUDGET, chunk=3, window=4, interval=INTERVAL),
    "adakv": SNAPKV | AdaKV(),
    "adakv keydiff": KeyDiff(budget=BUDGET, interval=INTERVAL) | AdaKV(floor=0.5),
    "kvcrush": KVCrush(budget=BUDGET),
    "kvcrush snapkv": SNAPKV | KVCrush(ratio=0.5, anchor="random"),
    "kvcrush adakv": SNAPKV | AdaKV() | KVCrush(),
}
MERGING: dict[str, Policy] = {
    "kvmerger": KVMerger(budget=BUDGET, sinks=2, interval=INTERVAL),
    "kvmerger votes": KVMerger(budget=BUDGET, sinks=2, value_scale="votes", interval=INTERVAL),
    "kvmerger before": KVMerger(budget=BUDGET, sinks=2, rotation="before", interval=INTERVAL),
    "kvmerger threshold": KVMerger(mode="threshold", threshold=0.3, interval=INTERVAL),
    "cam": HITTERS | CaM(targets=3),
    "cam streaming": StreamingLLM(budget=BUDGET, interval=INTERVAL, positions="absolute") | CaM(3),
    "d2o": D2O(budget=BUDGET, skip_layers=False, interval=INTERVAL),
    "weightedkv": WeightedKV(budget=BUDGET, sinks=2, recent=3, interval=INTERVAL),
}
POLICIES = EVICTING | MERGING
# numbers beside entries are those of attention, which other rows and other heads see
KV_HEADS = (1, 2, 4)
LENGTHS = ((40,), (40, 23, 9))


@functools.cache
def model(kv_heads: int):
    """A Llama of two layers with 4 query heads."""
    return tiny_llama(kv_heads=kv_heads)


@functools.cache
def fast(name: str, kv_heads: int):
    """It, under a policy."""
    policy = Full() if name == "full" else POLICIES[name]
    return kvfx.compress(model(kv_heads), policy, compile=False, verify=False)


def selecting(name: str) -> Select:
    """The part of a policy that says how many entries stay."""
    plan = fast(name, 2).plan.sites[0]
    assert plan.select is not None
    return plan.select


def entries(past, layer: int, row: int) -> list[tuple[Tensor, Tensor]]:
    """Live keys and values of each KV head [n, D], [n, Dv]."""
    buffers = past.state.buffers[layer]
    lengths = buffers["length"][row].tolist()
    if "k_flat" in buffers:
        starts = buffers["start"][row].tolist()
        spans = [slice(first, first + count) for first, count in zip(starts, lengths, strict=True)]
        return [(buffers["k_flat"][row, span], buffers["v_flat"][row, span]) for span in spans]
    k, v = buffers["k_cache"][row], buffers["v_cache"][row]
    return [(k[head, :count], v[head, :count]) for head, count in enumerate(lengths)]


def places(keys: Tensor, every: Tensor) -> list[int]:
    """The indices of `keys` [n, D] among `every` [T, D]: bit-copies."""
    same = (keys[:, None] == every[None]).all(-1)
    assert bool((same.sum(1) == 1).all())
    return same.int().argmax(1).tolist()


def read(name: str, kv_heads: int, prompt: dict[str, Tensor]):
    """The cache after a prompt, and the logits of its last row."""
    past = fast(name, kv_heads).new_cache()
    logits = fast(name, kv_heads)(**prompt, past_key_values=past, logits_to_keep=1).logits
    return past, logits


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("name", POLICIES)
def test_the_prompt(name, kv_heads, lengths):
    """T2 to T5: the model's logits, as many entries as specified, copies in order of position."""
    prompt, select = left_padded(lengths), selecting(name)
    found, logits = read(name, kv_heads, prompt)
    every, expected = read("full", kv_heads, prompt)
    assert torch.equal(logits, expected)
    for layer in range(2):
        for row, tokens in enumerate(lengths):
            held, dense = entries(found, layer, row), entries(every, layer, row)
            counts = [len(k) for k, _ in held]
            if not select.measured:
                assert sum(counts) == kv_heads * select.kept(tokens)
            if "adakv" not in name and not select.measured:
                assert set(counts) == {select.kept(tokens)}
            if name in MERGING:
                continue
            for (k, v), (k_all, v_all) in zip(held, dense, strict=True):
                kept = places(k, k_all)
                assert kept == sorted(set(kept))
                assert torch.equal(v, v_all[kept])
                protected = select.protected()
                recent = protected["recent"] + int(select.kept(tokens) * protected["share"])
                must = {*range(protected["sinks"]), *range(tokens - recent, tokens)}
                assert must & set(range(tokens)) <= set(kept)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_above_the_prompt_changes_nothing(name, kv_heads):
    """T1: logits and entries are the dense ones, at the prompt and at the steps after it."""
    if selecting(name).measured:
        pytest.skip("it has no budget")
    prompt = left_padded((BUDGET, 5))
    (small, _), (full, _) = (read(which, kv_heads, prompt) for which in (name, "full"))
    for step in range(INTERVAL - 1):
        token = torch.full((2, 1), 7 + step)
        found = fast(name, kv_heads)(token, past_key_values=small).logits
        expected = fast("full", kv_heads)(token, past_key_values=full).logits
        torch.testing.assert_close(found, expected)
    for row in range(2):
        pairs = zip(entries(small, 0, row), entries(full, 0, row), strict=True)
        for (k, v), (k_all, v_all) in pairs:
            assert torch.equal(k, k_all)
            assert torch.equal(v, v_all)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_rows_stand_for_themselves(name, lengths):
    """T7: neither padding nor the other rows of a batch change what a row keeps."""
    prompt = left_padded(lengths)
    together, _ = read(name, 2, prompt)
    for row, tokens in enumerate(lengths):
        alone, _ = read(name, 2, {"input_ids": prompt["input_ids"][row : row + 1, -tokens:]})
        for layer in range(2):
            pairs = zip(entries(together, layer, row), entries(alone, layer, 0), strict=True)
            for (k, v), (k_alone, v_alone) in pairs:
                torch.testing.assert_close(k, k_alone)
                torch.testing.assert_close(v, v_alone)


@pytest.mark.parametrize("name", POLICIES)
def test_equal_rows_stay_equal(name):
    """T7: through the prompt and the evictions of a reply."""
    ids = left_padded((30,))["input_ids"].expand(2, -1)
    past, _ = read(name, 2, {"input_ids": ids})
    for step in range(2 * INTERVAL + 1):
        logits = fast(name, 2)(torch.full((2, 1), 7 + step), past_key_values=past).logits
        torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize(
    "name", [name for name in POLICIES if "random" not in repr(POLICIES[name])]
)
def test_the_order_of_heads_does_not_matter(name):
    """T6: KV heads with their query heads permuted keep the same entries."""
    if "CaM" in repr(POLICIES[name]):
        pytest.skip("each head draws its own lot")
    order = torch.tensor([1, 0])
    turned = tiny_llama(kv_heads=2)
    for layer in turned.model.layers:
        attention = layer.self_attn
        for part, groups in (("q_proj", 2), ("k_proj", 2), ("v_proj", 2)):
            weight = getattr(attention, part).weight
            weight.copy_(weight.unflatten(0, (groups, -1))[order].flatten(0, 1))
        weight = attention.o_proj.weight
        weight.copy_(weight.unflatten(1, (2, -1))[:, order].flatten(1, 2))
    prompt = left_padded((40, 23))
    found, _ = read(name, 2, prompt)
    other = kvfx.compress(turned, POLICIES[name], compile=False, verify=False)
    past = other(**prompt, logits_to_keep=1).past_key_values
    for layer in range(2):
        for row in range(2):
            expected = entries(found, layer, row)
            for head, (k, v) in enumerate(entries(past, layer, row)):
                torch.testing.assert_close(k, expected[order[head]][0])
                torch.testing.assert_close(v, expected[order[head]][1])


@pytest.mark.parametrize("name", POLICIES)
def test_compressing_again_changes_nothing(name):
    """T8: entries that are as few as they may be are left alone."""
    past, _ = read(name, 2, left_padded((40, 23)))
    state, run = past.state, fast(name, 2).executor
    if selecting(name).measured:
        pytest.skip("a threshold may find more to merge among merged keys")
    before = [[entries(past, layer, row) for row in range(2)] for layer in range(2)]
    before = [[[(k.clone(), v.clone()) for k, v in heads] for heads in rows] for rows in before]
    run._run(state, "compact", run._tokens(state), *state.tensors())
    for layer in range(2):
        for row in range(2):
            pairs = zip(entries(past, layer, row), before[layer][row], strict=True)
            for (k, v), (k_old, v_old) in pairs:
                assert torch.equal(k, k_old)
                assert torch.equal(v, v_old)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("name", EVICTING)
def test_a_step_is_attention_over_the_kept_entries(name, kv_heads):
    """T9, and its identity: dropping an entry e turns the output o into
    (o - a_e v_e) / (1 - a_e), one dropped entry after the other.
    """
    lengths = (40, 23)
    found, _ = read(name, kv_heads, left_padded(lengths))
    every, _ = read("full", kv_heads, left_padded(lengths))
    plan = fast(name, kv_heads).plan.sites[0]
    q, scale = torch.randn(2, 4, 1, 16, dtype=torch.float32), plan.site.scale
    buffers = [found.state.buffers[0][key] for key in plan.store.buffers(plan.site)]
    position = torch.tensor([[40], [23]])
    attend = overload(f"attend_{plan.store.room}", "reference")
    out = attend(q, position, *buffers, scale=scale)
    for row in range(2):
        for head in range(4):
            kv_head = head * kv_heads // 4
            k, v = (x.double() for x in entries(every, 0, row)[kv_head])
            kept = places(entries(found, 0, row)[kv_head][0], k.float())
            weight = (k @ q[row, head, 0].double() * scale).softmax(0)
            direct = (weight[kept] @ v[kept]) / weight[kept].sum()
            torch.testing.assert_close(out[row, head, 0].double(), direct, atol=1e-5, rtol=1e-5)
            o = weight @ v
            for dropped in sorted(set(range(len(k))) - set(kept)):
                o = (o - weight[dropped] * v[dropped]) / (1 - weight[dropped])
                weight = weight / (1 - weight[dropped])
            torch.testing.assert_close(o, direct, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["kvcrush snapkv", "cam"])
def test_draws_follow_the_seed(name):
    """T11: the same seed draws the same, in any batch; another one draws otherwise."""
    *others, last = POLICIES[name].parts()
    other = _compose(*others, dataclasses.replace(last, seed=5))
    policies = (POLICIES[name], POLICIES[name], other)
    drawn = [_values(kvfx.compress(model(2), p, compile=False, verify=False)) for p in policies]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def _compose(*parts: Policy) -> Policy:
    return functools.reduce(operator.or_, parts)


def _values(compressed) -> Tensor:
    past = compressed(**left_padded((40,)), logits_to_keep=1).past_key_values
    return torch.cat([v for _, v in entries(past, 0, 0)])


@pytest.mark.parametrize("name", [name for name in POLICIES if "threshold" not in name])
def test_more_entries_are_nearer_to_the_dense_cache(name):
    """T12: on average over prompts and queries."""
    part, *others = POLICIES[name].parts()
    errors = []
    for budget in (10, 20, 36):
        policy = _compose(dataclasses.replace(part, budget=budget), *others)
        compressed = kvfx.compress(model(2), policy, compile=False, verify=False)
        errors.append(_error(compressed))
    assert errors[0] > errors[1] > errors[2] > 0.0


def _error(compressed) -> float:
    """The mean distance of one step's attention to that over the dense cache of 12 prompts."""
    prompt = left_padded((40,) * 12, seed=3)
    past = compressed(**prompt, logits_to_keep=1).past_key_values
    full = fast("full", 2)(**prompt, logits_to_keep=1).past_key_values
    q = torch.randn(12, 4, 1, 16, generator=torch.Generator().manual_seed(1))
    outs = []
    for held, which in ((past, compressed), (full, fast("full", 2))):
        plan = which.plan.sites[0]
        buffers = [held.state.buffers[0][key] for key in plan.store.buffers(plan.site)]
        attend = overload(f"attend_{plan.store.room}", "reference")
        outs.append(attend(q, torch.full((12, 1), 40), *buffers, scale=plan.site.scale))
    return float((outs[0] - outs[1]).norm(dim=-1).mean())


@pytest.mark.parametrize("name", POLICIES)
def test_an_endless_reply_needs_constant_bytes(name):
    model, (past, logits) = fast(name, 2), read(name, 2, left_padded((40, 23)))
    sizes, most = set(), BUDGET + selecting(name).interval
    for _ in range(40):
        logits = model(logits[:, -1:].argmax(-1), past_key_values=past).logits
        assert bool(logits.isfinite().all())
        sizes.add(past.nbytes())
        for buffers in past.state.buffers:
            held = buffers["length"].sum(1) / buffers["length"].shape[1]
            assert selecting(name).measured or float(held.max()) <= most
    assert selecting(name).measured or len(sizes) == 1
    assert past.state.positions == [80, 63]
    assert past.nbytes() == sum(x.untyped_storage().nbytes() for x in past.state.tensors())


@pytest.mark.parametrize("name", POLICIES)
def test_turns_and_replies_alternate(name):
    """Every program on one cache: prompt, steps, a long turn, steps, a short turn."""
    model, (past, logits) = fast(name, 2), read(name, 2, left_padded((40, 23)))
    for turn in (30, 3):
        for _ in range(INTERVAL + 2):
            logits = model(logits[:, -1:].argmax(-1), past_key_values=past).logits
        prompt = left_padded((turn, turn), seed=turn)
        logits = model(**prompt, past_key_values=past, logits_to_keep=1).logits
        assert bool(logits.isfinite().all())
    assert past.state.positions == [40 + 33 + 12, 23 + 33 + 12]


@pytest.mark.parametrize("name", POLICIES)
def test_they_compose_with_quantization(name):
    llama = tiny_llama(head_dim=32)
    plan = POLICIES[name] | KIVI(8, residual=0)
    if "adakv" in name or "threshold" in name:
        with pytest.raises(kvfx.errors.UnsupportedShape, match="KIVI"):
            kvfx.compress(llama, plan, compile=False, verify=False)
        return
    coded = kvfx.compress(llama, plan, compile=False, verify=False)
    reply = coded.generate(**left_padded((70, 40)), max_new_tokens=30)
    assert reply.shape == (2, 100)


@pytest.mark.parametrize("name", POLICIES)
def test_they_compose_with_sliding_windows(name):
    mixed = kvfx.compress(tiny_gemma3(), POLICIES[name], compile=False, verify=False)
    assert {site.store.room for site in mixed.plan.sites} >= {"ring"}
    assert mixed.generate(**left_padded((40, 23)), max_new_tokens=10).shape == (2, 50)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_repr_is_python(policy):
    assert eval(repr(policy)) == policy
