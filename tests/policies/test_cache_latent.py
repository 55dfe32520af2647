"""CacheLatent: the model's own tokens from a fraction of the bytes, and a reason where there is
none.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import kvfx
from kvfx.cache import BATCH
from kvfx.errors import PolicyError, UnsupportedShape
from kvfx.geometry import Causal, Site
from kvfx.memory import LENGTH, NEW, memory_bytes, memory_formula
from kvfx.policies.cache_latent import CacheLatent
from kvfx.testing.poison import poison_beyond
from kvfx.testing.tiny import left_padded, tiny, tiny_llama

CPU = torch.device("cpu")
LATENT = ("deepseek_v2", "deepseek_v3", "minicpm3")
ALL_HEADS: dict[str, object] = {"num_key_value_heads": 4}
POLICIES = [CacheLatent(), CacheLatent(absorb=True)]
_FAST: dict[object, tuple] = {}


def compressed(architecture: str, policy=POLICIES[0], **changes):
    """A tiny model and its compressed twin."""
    key = architecture, repr(policy), tuple(changes.items())
    if key not in _FAST:
        model = tiny(architecture, changes)
        _FAST[key] = model, kvfx.compress(model, policy, compile=False, verify=False)
    return _FAST[key]


def logits_in_pieces(fast, inputs, pieces) -> tuple[Tensor, object]:
    """Logits of left-padded rows that are read in pieces, and the cache."""
    ids, mask, cache, out, start = inputs["input_ids"], inputs["attention_mask"], None, [], 0
    for count in pieces:
        found = fast(
            ids[:, start : start + count],
            attention_mask=mask[:, : start + count],
            past_key_values=cache,
        )
        cache, start = found.past_key_values, start + count
        out.append(found.logits)
    return torch.cat(out, 1), cache


def test_buffers():
    site = Site(
        0, "s", 8, 4, 24, 12, 0.25, Causal(), None, torch.bfloat16, CPU, latent=(16, 8), linear=True
    )
    found = {
        name: (buffer.sizes(3, 7), buffer.dtype, buffer.counter)
        for name, buffer in CacheLatent().buffers(site).items()
    }
    assert found == {
        "latent": ((3, 1, 7, 24), torch.bfloat16, False),
        "length": ((3, 4), torch.int32, True),
    }
    assert CacheLatent(absorb=True).constraint(site) is None


@pytest.mark.parametrize(("entries", "bucket"), [(1, 256), (256, 256), (257, 512)])
def test_capacity(entries, bucket):
    assert CacheLatent().capacity(entries, bounded=False) == bucket
    assert CacheLatent().capacity(entries, bounded=True) == entries


def test_facts():
    for policy in POLICIES:
        assert eval(repr(policy)) == policy
    policy = CacheLatent()
    assert (policy.room, policy.rows, policy.croppable, policy.rebuilds) == (
        "latent",
        "keep",
        True,
        True,
    )
    with pytest.raises(PolicyError, match=r"CacheLatent\(absorb='yes'\): absorb must be one of"):
        CacheLatent(absorb="yes")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("architecture", LATENT)
def test_the_model_s_own_tokens(architecture, policy):
    model, fast = compressed(architecture, policy)
    inputs = left_padded([40, 23, 7])
    options = {"max_new_tokens": 24, "do_sample": False, "min_new_tokens": 24}
    assert torch.equal(fast.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", ALL_HEADS), ("gpt2", {}), ("gptj", {}), ("bloom", {}), ("gpt_neox", {})],
    ids=str,
)
def test_the_hidden_state_of_other_models(architecture, changes):
    """Soft rules of a site hold over what is computed again: distances of Bloom, say."""
    model, fast = compressed(architecture, **changes)
    inputs = left_padded([30, 11])
    options = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    assert torch.equal(fast.generate(**inputs, **options), model.generate(**inputs, **options))
    assert fast.report.after < 0.6 * fast.report.before


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(
    "pieces", [(33,), (32, 1), (20, 12, 1), (20, 1, 1, 10, 1), (7,) + (1,) * 26], ids=str
)
@pytest.mark.parametrize("architecture", ["deepseek_v2", "minicpm3"])
def test_pieces_equal_one_pass(architecture, pieces, policy):
    model, fast = compressed(architecture, policy)
    inputs = left_padded([33, 29])
    expected = model(**inputs).logits
    found, _ = logits_in_pieces(fast, inputs, pieces)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_garbage_beyond_the_live_entries_is_not_seen(policy):
    _, fast = compressed("deepseek_v3", policy)
    inputs = left_padded([33, 29])
    clean, _ = logits_in_pieces(fast, inputs, (20, 12, 1))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    found = fast(ids[:, :20], attention_mask=mask[:, :20])
    cache, out = found.past_key_values, [found.logits]
    for start, end in ((20, 32), (32, 33)):
        for buffers in cache.state.buffers:
            poison_beyond(buffers["latent"], buffers["length"][:, :1])
        found = fast(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        out.append(found.logits)
    real = mask.bool()
    assert torch.equal(torch.cat(out, 1)[real], clean[real])


def test_a_cropped_cache_goes_on():
    _, fast = compressed("minicpm3")
    ids = left_padded([33])["input_ids"]
    cache = fast(ids).past_key_values
    cache.crop(21)
    again = fast(ids[:, 21:], past_key_values=cache).logits
    torch.testing.assert_close(again, fast(ids).logits[:, 21:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "changes", "numbers", "dense"),
    [*((name, {}, 24, 144) for name in LATENT), ("llama", ALL_HEADS, 65, 128)],
    ids=str,
)
def test_bytes_are_those_of_the_cut(architecture, changes, numbers, dense):
    _, fast = compressed(architecture, **changes)
    tokens = 4096
    for site in fast.report.sites:
        assert site.before == 4 * dense
        # one count per head beside the entries
        assert site.after == 4 * numbers + 4 * 4 / tokens
    cache = fast(**left_padded([300, 7])).past_key_values
    held = 2 * 2 * (512 * numbers * 4 + 4 * 4)
    assert cache.state.nbytes() == held
    assert memory_bytes(fast.plan, 2, 300) == held
    assert memory_formula(fast.plan).subs({BATCH: 2, LENGTH: 300, NEW: 0}) == held


def test_the_model_is_left_as_it_was():
    model = tiny("deepseek_v3")
    before = copy.deepcopy(model.state_dict())
    ids = left_padded([21])["input_ids"]
    expected = model(ids).logits
    kvfx.compress(model, CacheLatent(absorb=True), compile=False).generate(ids, max_new_tokens=3)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(ids).logits, expected)


def test_programs_show_what_is_computed_again():
    _, fast = compressed("minicpm3")
    mark = f"# {fast.plan.sites[0].site.name} <- CacheLatent"
    weight = "@model.layers.0.self_attn.kv_b_proj.weight"
    for program, verb in (("decode", "attend"), ("extend", "extend")):
        lines = [line for line in fast.graph(program).text.splitlines() if line.endswith(mark)]
        assert sum("f32[B,1,C,112] = linear(" in line and weight in line for line in lines) == 1
        assert sum(f"kvfx.{verb}_dense" in line for line in lines) == 1
    text = fast.graph("prefill").text
    assert "[B,1,C,112]" not in text
    assert text.count("kvfx.store_latent") == 2


def test_absorbing_decodes_without_keys_and_values():
    """K and V of 4 heads have 24 and 12 channels; what is attended to has 24 of one head."""
    _, fast = compressed("minicpm3", CacheLatent(absorb=True))
    nodes = [node for node in fast.graph("decode").nodes if "attend_dense" in str(node.target)]
    for node in nodes:
        assert node.args[2] is node.args[3]
        assert node.args[2].meta["val"].shape[1::2] == (1, 24)


def test_nothing_narrower_is_refused_with_the_bytes():
    reason = "K and V are not computed from anything narrower: 256 bytes per token either way"
    with pytest.raises(UnsupportedShape, match=rf"layers.0.self_attn: CacheLatent.*: {reason}"):
        kvfx.compress(tiny_llama(), CacheLatent(), compile=False)
    fast = kvfx.compress(tiny_llama(), CacheLatent(), compile=False, strict=False)
    assert [site.note for site in fast.report.sites] == [f"dense: {reason}"] * 2
    assert fast.report.after == pytest.approx(fast.report.before, rel=1e-3)


def test_what_is_not_linear_is_not_absorbed():
    model = tiny("llama", ALL_HEADS)
    with pytest.raises(UnsupportedShape, match="K and V are not linear in what they are computed"):
        kvfx.compress(model, CacheLatent(absorb=True), compile=False)


def test_a_bias_is_not_linear():
    model = tiny("gpt2")
    for block in model.get_submodule("transformer.h").children():
        block.get_parameter("attn.c_attn.bias").normal_()
    with pytest.raises(UnsupportedShape, match="K and V are not linear in what they are computed"):
        kvfx.compress(model, CacheLatent(absorb=True), compile=False)


def test_entries_are_not_dropped_per_head():
    with pytest.raises(UnsupportedShape, match="heads share what K and V are computed from"):
        kvfx.compress(tiny("minicpm3"), kvfx.SnapKV() | CacheLatent(), compile=False)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_compiled(policy):
    model = tiny("minicpm3")
    fast = kvfx.compress(model, policy)
    inputs = left_padded([40, 23])
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    assert torch.equal(fast.generate(**inputs, **options), model.generate(**inputs, **options))
