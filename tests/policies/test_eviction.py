"""Every method that evicts: what it keeps, what stays exact, and what decode adds.

The oracle is written from the papers, with all attention weights of the prompt at hand.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import kvfx
from kvfx import H2O, KIVI, TOVA, Full, KeyDiff, KNorm, SnapKV
from kvfx.errors import PolicyError
from kvfx.testing.tiny import left_padded, tiny_llama

BUDGET = 12
POLICIES = {
    "h2o": H2O(budget=BUDGET, interval=4),
    "snapkv": SnapKV(budget=BUDGET, window=5, pool=3, interval=4),
    "snapkv max": SnapKV(budget=BUDGET, window=5, pool=3, pooling="max", interval=4),
    "tova": TOVA(budget=BUDGET, interval=4),
    "keydiff": KeyDiff(budget=BUDGET, sinks=1, recent=2, interval=4),
    "knorm": KNorm(budget=BUDGET, interval=4),
}
KV_HEADS = (1, 2, 4)
LENGTHS = ((40,), (40, 23, 13))


@cache
def model(kv_heads: int):
    """A Llama of two layers with 4 query heads."""
    return tiny_llama(kv_heads=kv_heads)


@cache
def fast(policy: str, kv_heads: int):
    """It, under a policy."""
    chosen = Full() if policy == "full" else POLICIES[policy]
    return kvfx.compress(model(kv_heads), chosen, compile=False, verify=False)


def weights(kv_heads: int, prompt: dict[str, Tensor]) -> list[Tensor]:
    """Attention weights of the prompt per layer, [B, H, S, S] fp32, from the model itself."""
    eager = model(kv_heads)
    before = eager.config._attn_implementation
    eager.set_attn_implementation("eager")
    try:
        return list(eager(**prompt, output_attentions=True, use_cache=False).attentions)
    finally:
        eager.set_attn_implementation(before)


def expected_score(policy, weight: Tensor, k: Tensor, real: Tensor) -> Tensor:
    """The scores of one prompt row's real tokens: weight [H, T, T], k [K, T, D]."""
    heads, kv_heads = weight.shape[0], k.shape[0]
    groups = weight[:, real][:, :, real].unflatten(0, (kv_heads, heads // kv_heads))
    k = k[:, real]
    if isinstance(policy, H2O):
        return groups.sum((1, 2))
    if isinstance(policy, TOVA):
        return groups[:, :, -1].mean((0, 1)).expand(kv_heads, -1)
    if isinstance(policy, KNorm):
        return -k.norm(dim=-1)
    if isinstance(policy, KeyDiff):
        unit = k / k.norm(dim=-1, keepdim=True)
        mean = unit.mean(1, keepdim=True)
        return -(unit * mean / mean.norm(dim=-1, keepdim=True)).sum(-1)
    score = groups[:, :, -policy.window :].sum(2).mean(1)
    tokens, half = score.shape[1], policy.pool // 2
    pooled = torch.empty_like(score)
    for at in range(tokens):
        near = score[:, max(at - half, 0) : at + half + 1]
        pooled[:, at] = near.sum(1) / policy.pool if policy.pooling == "mean" else near.amax(1)
    return pooled


def expected_kept(policy, score: Tensor) -> list[list[int]]:
    """The tokens that each KV head keeps, sorted."""
    tokens = score.shape[1]
    count = min(tokens, policy.allowed(tokens))
    newest = {"recent": 0, "share": 0.0, "sinks": 0, **policy.attributes()}
    recent = newest["recent"] + int(count * newest["share"])
    protected = {*range(newest["sinks"]), *range(tokens - recent, tokens)}
    out = []
    for row in score:
        rest = sorted(set(range(tokens)) - protected, key=lambda at: (-float(row[at]), at))
        out.append(sorted([*protected, *rest[: count - len(protected)]]))
    return out


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("name", POLICIES)
def test_the_prompt_keeps_what_the_paper_says(name, kv_heads, lengths):
    policy, prompt = POLICIES[name], left_padded(lengths)
    found = fast(name, kv_heads)(**prompt, logits_to_keep=1).past_key_values.state
    every = fast("full", kv_heads)(**prompt, logits_to_keep=1).past_key_values.state
    for layer, weight in enumerate(weights(kv_heads, prompt)):
        for row, tokens in enumerate(lengths):
            real = prompt["attention_mask"][row].bool()
            keys = every.buffers[layer]["k_cache"][row, :, :tokens]
            padded = torch.zeros(keys.shape[0], len(real), keys.shape[2])
            padded[:, real] = keys
            kept = expected_kept(policy, expected_score(policy, weight[row], padded, real))
            for head, chosen in enumerate(kept):
                count = int(found.buffers[layer]["length"][row, head])
                assert count == len(chosen) == policy.kept(tokens)
                entries = found.buffers[layer]["k_cache"][row, head, :count]
                torch.testing.assert_close(entries, keys[head, chosen])


@pytest.mark.parametrize("name", POLICIES)
def test_the_first_token_is_the_models(name):
    prompt = left_padded((40, 23))
    logits = fast(name, 2)(**prompt, logits_to_keep=1).logits
    assert torch.equal(logits, fast("full", 2)(**prompt, logits_to_keep=1).logits)


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_above_the_prompt_changes_nothing(name):
    prompt = left_padded((BUDGET, 5))
    small, full = (each.new_cache() for each in (fast(name, 2), fast("full", 2)))
    for step in range(3):
        inputs = prompt if step == 0 else {"input_ids": torch.full((2, 1), 7 + step)}
        found = fast(name, 2)(**inputs, past_key_values=small, logits_to_keep=1).logits
        expected = fast("full", 2)(**inputs, past_key_values=full, logits_to_keep=1).logits
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", POLICIES)
def test_rows_of_a_batch_do_not_matter_to_each_other(name):
    together = fast(name, 2)(**left_padded((40, 23)), logits_to_keep=1).past_key_values
    prompt = left_padded((40, 23))
    alone = {"input_ids": prompt["input_ids"][1:, 17:]}
    past = fast(name, 2)(**alone, logits_to_keep=1).past_key_values
    for both, one in zip(together.state.buffers, past.state.buffers, strict=True):
        count = int(one["length"][0, 0])
        torch.testing.assert_close(both["k_cache"][1, :, :count], one["k_cache"][0, :, :count])


@pytest.mark.parametrize("name", POLICIES)
def test_an_endless_reply_needs_constant_bytes(name):
    model, past = fast(name, 2), fast(name, 2).new_cache()
    logits = model(**left_padded((40, 23)), past_key_values=past, logits_to_keep=1).logits
    sizes = set()
    for _ in range(40):
        logits = model(logits[:, -1:].argmax(-1), past_key_values=past).logits
        assert bool(logits.isfinite().all())
        sizes.add(past.nbytes())
        for buffers in past.state.buffers:
            assert int(buffers["length"].max()) <= BUDGET + 4
    assert len(sizes) == 1
    assert past.state.positions == [80, 63]


def test_h2o_counts_every_row_once():
    """Weights of a row sum to one: while nothing is evicted, scores sum to query rows."""
    model, past = fast("h2o", 2), fast("h2o", 2).new_cache()
    model(**left_padded((9, 4)), past_key_values=past, logits_to_keep=1)
    for token in (5, 6):
        model(torch.full((2, 1), token), past_key_values=past)
    model(torch.full((2, 1), 8).expand(2, 1), past_key_values=past)
    for buffers in past.state.buffers:
        rows = torch.tensor([12.0, 7.0])[:, None].expand(2, 2)
        # 2 query heads per KV head
        torch.testing.assert_close(buffers["score"].sum(-1), 2 * rows)


def test_a_second_turn_is_scored_as_well():
    prompt, turn = left_padded((9,)), left_padded((6,), seed=1)
    model, past = fast("h2o", 2), fast("h2o", 2).new_cache()
    model(**prompt, past_key_values=past, logits_to_keep=1)
    # 15 tokens are below 12 + 4 entries: nothing is evicted
    model(**turn, past_key_values=past, logits_to_keep=1)
    whole = {name: torch.cat((prompt[name], turn[name]), 1) for name in ("input_ids",)}
    every = weights(2, whole)
    for buffers, weight in zip(past.state.buffers, every, strict=True):
        expected = weight[0].unflatten(0, (2, 2)).sum((1, 2))
        torch.testing.assert_close(buffers["score"][0, :, :15], expected)


def test_scores_move_with_their_entries_at_an_eviction():
    model, past = fast("h2o", 2), fast("h2o", 2).new_cache()
    model(**left_padded((14,)), past_key_values=past, logits_to_keep=1)
    for token in range(6):
        model(torch.full((1, 1), 9 + token), past_key_values=past)
    for buffers in past.state.buffers:
        count = int(buffers["length"][0, 0])
        assert bool((buffers["score"][0, :, :count] > 0).all())
        assert bool((buffers["score"][0, :, count:] == 0).all())


@pytest.mark.parametrize("name", POLICIES)
def test_they_compose_with_quantization(name):
    policy = POLICIES[name] | KIVI(8, residual=0)
    fast = kvfx.compress(tiny_llama(head_dim=32), policy, compile=False, verify=False)
    reply = fast.generate(**left_padded((70, 40)), max_new_tokens=30)
    assert reply.shape == (2, 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(pool=4), "an odd number"),
        (lambda: SnapKV(window=0), "window must be an integer of at least 1"),
        (lambda: SnapKV(pooling="sum"), "pooling must be one of 'mean', 'max'"),
        (lambda: H2O(recent=1.5), "a share of the budget"),
        (lambda: H2O(budget=0.0), "0 < budget <= 1"),
        (lambda: TOVA(interval=0), "interval must be an integer of at least 1"),
        (lambda: KeyDiff(sinks=-1), "sinks must be an integer of at least 0"),
        (lambda: KNorm(positions="here"), "positions must be one of"),
        (lambda: H2O() | SnapKV(), "both play the role 'select'"),
    ],
    ids=[
        "even pool",
        "window",
        "pooling",
        "recent",
        "budget",
        "interval",
        "sinks",
        "positions",
        "two",
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(PolicyError, match=message):
        make()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_repr_is_python(policy):
    assert eval(repr(policy)) == policy


def test_scores_of_quantized_entries_are_those_of_exact_ones():
    """With 8 bits, H2O adds up nearly the same weights for each entry."""
    scores = []
    for policy in (H2O(budget=1.0), H2O(budget=1.0) | KIVI(8, residual=0)):
        fast = kvfx.compress(tiny_llama(head_dim=32), policy, compile=False, verify=False)
        past = fast.new_cache()
        fast(**left_padded((70, 40)), past_key_values=past, logits_to_keep=1)
        for token in range(20):
            fast(torch.full((2, 1), token), past_key_values=past)
        scores.append([buffers["score"][:, :, :90] for buffers in past.state.buffers])
    for exact, coded in zip(*scores, strict=True):
        torch.testing.assert_close(coded, exact, rtol=0.05, atol=0.05)
