"""The trace of a cache: what it says about entries is what the buffers hold."""

from __future__ import annotations

import json
import sys
from xml.etree import ElementTree

import pytest
import torch
from transformers.models.llama import modeling_llama

import kvfx
from kvfx.cache_trace.trace import STATUSES
from kvfx.errors import InputError, UnsupportedOperation
from kvfx.testing.tiny import tiny_gemma3, tiny_llama

IDS = torch.randint(3, 90, (1, 101), generator=torch.Generator().manual_seed(1))
NEW = 70
EVICTING = {
    "snapkv": kvfx.SnapKV(budget=0.4),
    "streaming": kvfx.StreamingLLM(budget=0.3, positions="absolute"),
    "h2o, heads that differ": kvfx.H2O(budget=0.4) | kvfx.AdaKV(),
    "refined": kvfx.PrefixKV(budget=0.4, online=True) | kvfx.KVCrush(),
    "tova": kvfx.TOVA(budget=32),
    "merged": kvfx.KVMerger(budget=0.4),
    "merged, heads that differ": kvfx.KVMerger(mode="threshold", threshold=0.2),
    "values merged": kvfx.WeightedKV(budget=0.4),
    "coded": kvfx.SnapKV(budget=0.6) | kvfx.KIVI(bits=8, residual=32),
}


# leaves the first two layers and the last one alone
OUTER = {"merged into the nearest": kvfx.D2O(budget=0.5)}
EVERY = {**EVICTING, **OUTER}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(head_dim=32, layers=4)


@pytest.fixture(scope="module")
def dense(model):
    return compressed(model, kvfx.Full())


@pytest.fixture(scope="module", params=EVERY.values(), ids=EVERY)
def fast(model, request):
    """The model under each policy that drops, merges or quantizes."""
    return compressed(model, request.param)


def compressed(model, policy, **options):
    return kvfx.compress(model, policy, compile=False, verify=False, **options)


def state_after(fast, tokens, prompt):
    """The state when the same tokens were read in the same way."""
    cache = fast.new_cache()
    fast(torch.tensor([tokens[:prompt]]), past_key_values=cache)
    for token in tokens[prompt:]:
        fast(torch.tensor([[token]]), past_key_values=cache)
    return cache.state


def keys_in(fast, state, site):
    """The keys of a site's entries [1, K, C, D] in order, exact ones as they are."""
    plan, buffers = fast.plan.sites[site], state.buffers[site]
    store = [buffers[name] for name in plan.store.buffers(plan.site)]
    load = getattr(torch.ops.kvfx, f"load_{plan.store.room}").reference
    return load(*store, **plan.store.attributes(plan.site))[0]


def test_entries_are_where_the_trace_says(fast, dense):
    """Keys of the first layer depend on their token and position alone: each entry that took in
    nothing has the key of the position that the trace gives it.
    """
    trace = fast.trace_cache(IDS, NEW)
    state = state_after(fast, trace.tokens, trace.prompt)
    true = keys_in(dense, state_after(dense, trace.tokens, trace.prompt), 0)
    keys = keys_in(fast, state, 0)
    for head in range(2):
        held = trace.held(0, head)
        assert len(held) == state.buffers[0]["length"][0, head]
        assert len(trace.held(2, head)) < len(trace.tokens)
        assert list(held) == sorted(held)
        took_in = {change.into for change in trace.sites[0].heads[head]}
        status = trace.status(0, head)
        for row, position in enumerate(held):
            error = (keys[0, head, row] - true[0, head]).abs().amax(-1)
            if status[position] == "quantized":
                assert error.argmin() == position
            elif position not in took_in:
                assert error[position] == 0


def test_all_layers_after_the_prompt(fast, dense):
    """A prompt's keys are the model's own in every layer."""
    trace = fast.trace_cache(IDS, 0)
    state = state_after(fast, trace.tokens, trace.prompt)
    full = state_after(dense, trace.tokens, trace.prompt)
    assert len(trace.held(2)) < trace.prompt
    for site in range(4):
        keys, true = keys_in(fast, state, site), keys_in(dense, full, site)
        for head in range(2):
            held, changes = trace.held(site, head), trace.sites[site].heads[head]
            took_in = {change.into for change in changes}
            assert len(held) == state.buffers[site]["length"][0, head]
            for row, position in enumerate(held):
                if position not in took_in and trace.status(site, head)[position] == "exact":
                    assert torch.equal(keys[0, head, row], true[0, head, position])


def test_the_trace_follows_generate(model):
    fast = compressed(model, EVICTING["snapkv"])
    trace = fast.trace_cache(IDS, NEW)
    out = fast.generate(IDS, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert trace.tokens == tuple(out[0].tolist())
    assert trace.prompt == 101
    assert trace.steps[0] == "prefill"
    assert trace.steps.count("decode") == NEW
    assert trace.seen[-1] == len(trace.tokens)


def test_codes_are_told_from_exact_entries(model):
    fast = compressed(model, kvfx.KIVI(bits=4, residual=32))
    trace = fast.trace_cache(IDS, NEW)
    state = state_after(fast, trace.tokens, trace.prompt)
    status = trace.status(0, 1)
    coded = int(state.buffers[0]["k_quantized"][0, 1])
    assert status == ("quantized",) * coded + ("exact",) * (len(trace.tokens) - coded)
    assert trace.status(0, 1, step=0).count("quantized") < coded


def test_merged_tokens_name_the_one_that_took_them_in(model):
    trace = compressed(model, EVICTING["merged"]).trace_cache(IDS, 0)
    merged = [change for change in trace.sites[0].heads[0] if change.status == "merged"]
    assert merged
    held = trace.held(0)
    assert all(change.into in held for change in merged)


def test_what_a_window_has_passed():
    fast = compressed(tiny_gemma3(window=16), kvfx.StreamingLLM(budget=0.5))
    trace = fast.trace_cache(IDS, 5)
    assert trace.held(0) == tuple(range(106 - 16, 106))
    assert set(trace.status(0)[:90]) == {"passed"}
    assert "dropped" in trace.status(3)


def test_a_site_under_the_models_own_mask_keeps_all(monkeypatch):
    def every_third(config, inputs_embeds, **_):
        rows = torch.arange(inputs_embeds.shape[1])
        seen = (rows <= rows[:, None]) & ((rows % 3 == 0) | (rows == rows[:, None]))
        return seen[None, None].expand(inputs_embeds.shape[0], 1, -1, -1)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", every_third)
    fast = compressed(tiny_llama(), kvfx.SnapKV(budget=0.5), strict=False)
    trace = fast.trace_cache(IDS[:, :20], 3)
    assert trace.held(1, 1) == tuple(range(23))


def test_prompts_in_chunks(model):
    fast = compressed(model, EVICTING["streaming"], prefill_chunk=40)
    trace = fast.trace_cache(IDS, 3)
    assert trace.steps[:2] == ("prefill", "extend") or "extend" in trace.steps
    state = state_after(fast, trace.tokens, trace.prompt)
    assert len(trace.held(0)) == state.buffers[0]["length"][0, 0]


def test_the_trace_as_data_and_pictures(model, tmp_path):
    trace = compressed(model, EVICTING["coded"]).trace_cache(IDS, 10)
    document = json.loads(json.dumps(trace.to_dict()))
    assert document["statuses"] == STATUSES
    assert document["tokens"] == list(trace.tokens)
    assert document["sites"][0]["heads"][0][0] == [0, 0, trace.status(0, step=0)[0], None]
    root = ElementTree.fromstring(trace.svg(head=1))
    assert root.get("role") == "img"
    assert trace._repr_svg_() == trace.svg(0)
    path = trace.save(tmp_path / "trace.svg")
    assert path.read_text("utf-8") == trace.svg(0)


def test_a_picture_covers_each_position_while_it_is_known(model):
    """The area of all rectangles is that of the tokens over the steps at which they were seen."""
    trace = compressed(model, EVICTING["snapkv"]).trace_cache(IDS, 10)
    root, area = ElementTree.fromstring(trace.svg()), 0
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        for piece in path.get("d").split("M")[1:]:
            wide, high = piece.split("h")[1].split("v")
            area += int(wide) * int(high)
    assert area == len(trace.sites) * sum(trace.seen)


def test_other_formats_are_drawn_by_matplotlib(model, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    trace = compressed(model, EVICTING["snapkv"]).trace_cache(IDS, 5)
    path = trace.save(tmp_path / "trace.png", head=1)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    trace = compressed(model, EVICTING["snapkv"]).trace_cache(IDS, 1)
    with pytest.raises(UnsupportedOperation, match=r"pip install matplotlib, or save as \.svg"):
        trace.save(tmp_path / "trace.png")


@pytest.mark.parametrize(
    ("ids", "new", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.int64), 1, "follows one row"),
        (torch.zeros(1, 0, dtype=torch.int64), 1, "follows one row"),
        (IDS, -1, "max_new_tokens=-1"),
    ],
)
def test_what_cannot_be_traced(model, ids, new, message):
    with pytest.raises(InputError, match=message):
        compressed(model, kvfx.Full()).trace_cache(ids, new)


def test_a_head_that_is_not_there(model):
    trace = compressed(model, kvfx.Full()).trace_cache(IDS[:, :5], 0)
    with pytest.raises(InputError, match="KV heads 0 to 1"):
        trace.svg(head=2)
