"""The host's counts agree with the device's, and decide growth, eviction and refusal."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch._dynamo.utils import counters

import kvfx
from kvfx import KIVI, Full, PerLayer, StreamingLLM
from kvfx.cache import Buffer
from kvfx.errors import CapacityExceeded, UnsupportedOperation
from kvfx.model import CompressedCache
from kvfx.runtime import State
from kvfx.testing.tiny import left_padded, tiny_llama

POLICIES = {
    "full": Full(),
    "kivi window": KIVI(4, residual=32),
    "kivi published": KIVI(4, residual=32, mode="kivi"),
    "streaming": StreamingLLM(budget=0.5, interval=7),
    "streaming 20": StreamingLLM(budget=20, interval=16, positions="absolute"),
    "streaming kivi": StreamingLLM(budget=50, interval=9) | KIVI(8, residual=32),
    "per layer": PerLayer(KIVI(2, residual=32), {0: StreamingLLM(budget=0.5, interval=5)}),
}


@cache
def fast(policy: str = "full", max_length: int | None = None):
    """A tiny model under a policy."""
    return kvfx.compress(
        tiny_llama(head_dim=32),
        POLICIES[policy],
        compile=False,
        verify=False,
        max_length=max_length,
    )


def read(policy: str, lengths, steps: int, max_length: int | None = None) -> CompressedCache:
    """The cache after a padded prompt, an extending turn and some decoded tokens."""
    model, past = fast(policy), fast(policy).new_cache(max_length)
    model(**left_padded(lengths), past_key_values=past, logits_to_keep=1)
    _decode(model, past, len(lengths), 3)
    turn = left_padded([1 + 4 * row for row in range(len(lengths))], seed=1)
    model(**turn, past_key_values=past, logits_to_keep=1)
    _decode(model, past, len(lengths), steps)
    return past


def _decode(model, past: CompressedCache, batch: int, steps: int) -> None:
    for step in range(steps):
        model(torch.full((batch, 1), 3 + step % 90), past_key_values=past)
        assert_counts_agree(past.state)


def assert_counts_agree(state: State) -> None:
    """What the host believes is what every KV head of every site holds, and it fits."""
    assert state.next_position[:, 0].tolist() == state.positions
    for plan, buffers, capacity in zip(
        state.plan.sites, state.buffers, state.capacities, strict=True
    ):
        entries = state.entries[plan.schedule]
        assert buffers["length"].tolist() == [[count] * plan.site.kv_heads for count in entries]
        assert plan.store.capacity(max(entries), bounded=True) <= capacity


@pytest.mark.parametrize("lengths", [(50,), (3, 70, 33)], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_host_counts_what_the_device_holds(policy, lengths, poison):
    past = read(policy, lengths, 40)
    assert_counts_agree(past.state)
    seen = [length + 3 + 1 + 4 * row + 40 for row, length in enumerate(lengths)]
    assert past.state.positions == seen
    assert past.get_seq_length() == max(lengths) + 3 + (1 + 4 * (len(lengths) - 1)) + 40


@pytest.mark.parametrize("policy", ["streaming", "streaming 20", "streaming kivi"])
def test_an_endless_stream_needs_constant_bytes(policy):
    model, past = fast(policy), fast(policy).new_cache()
    select = model.plan.sites[0].select
    model(**left_padded([90]), past_key_values=past, logits_to_keep=1)
    allowed, sizes, held = select.kept(90) + select.interval, set(), []
    for _ in range(200):
        model(torch.tensor([[7]]), past_key_values=past)
        held.append(int(past.state.buffers[0]["length"].max()))
        sizes.add(past.nbytes())
    assert max(held) <= allowed
    # it does fill up between two evictions, and never falls below the budget
    assert min(held) == select.kept(90)
    assert sizes == {model.memory(1, 90)}


def test_a_long_turn_gives_its_memory_back():
    model, past = fast("streaming 20"), fast("streaming 20").new_cache()
    model(**left_padded([90]), past_key_values=past, logits_to_keep=1)
    before = past.nbytes()
    model(**left_padded([400]), past_key_values=past, logits_to_keep=1)
    assert past.nbytes() == before


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 600])
def test_a_dense_cache_grows_by_buckets(tokens):
    model, past = fast(), fast().new_cache()
    model(left_padded([tokens])["input_ids"], past_key_values=past, logits_to_keep=1)
    assert set(past.state.capacities) == {-(-tokens // 256) * 256}


def test_entries_stay_when_the_cache_grows():
    model, past = fast(), fast().new_cache()
    ids = left_padded([259])["input_ids"]
    model(ids[:, :255], past_key_values=past, logits_to_keep=1)
    logits = [model(ids[:, at : at + 1], past_key_values=past).logits for at in range(255, 259)]
    whole = model(ids, logits_to_keep=4).logits
    bound = torch.finfo(torch.float32).eps ** 0.5 * float(whole.abs().max())
    assert float((torch.cat(logits, 1) - whole).abs().max()) <= bound


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cache_of_as_many_tokens_as_are_read(policy, poison):
    """What is allocated is smaller, what it holds is the same, and one token more is refused."""
    model, seen = fast(policy), 90 + 3 + 5 + 10
    found, expected = read(policy, (3, 90), 10, max_length=seen), read(policy, (3, 90), 10)
    assert found.nbytes() < expected.nbytes() or model.plan.selects
    assert found.nbytes() <= expected.nbytes()
    last = torch.full((2, 1), 7)
    with pytest.raises(CapacityExceeded, match=f"{seen + 1} tokens do not fit into max_length"):
        model(last, past_key_values=found)
    found.max_length = found.state.max_length = None
    one, other = (model(last, past_key_values=past).logits for past in (found, expected))
    bound = torch.finfo(torch.float32).eps ** 0.5 * float(other.abs().max())
    assert float((one - other).abs().max()) <= bound


@pytest.mark.parametrize("rows", [1, 5])
def test_max_length_refuses_before_anything_is_computed(rows):
    model, ids = fast(max_length=16), left_padded([21])["input_ids"]
    past = model(ids[:, :15], logits_to_keep=1).past_key_values
    if rows == 1:
        model(ids[:, 15:16], past_key_values=past)
    columns, before = past.get_seq_length(), [tensor.clone() for tensor in past.state.tensors()]
    with pytest.raises(CapacityExceeded) as caught:
        model(ids[:, columns : columns + rows], past_key_values=past)
    seen = columns + rows
    assert str(caught.value) == (f"{seen} tokens do not fit into max_length=16: give a larger one")
    assert past.get_seq_length() == columns
    assert all(map(torch.equal, past.state.tensors(), before))
    if rows > 1:
        # one more token fits
        found = model(ids[:, 15:16], past_key_values=past).logits
        expected = fast()(ids[:, :16]).logits[:, -1:]
        bound = torch.finfo(torch.float32).eps ** 0.5 * float(expected.abs().max())
        assert float((found - expected).abs().max()) <= bound


def test_max_length_refuses_a_prompt():
    with pytest.raises(CapacityExceeded, match="17 tokens do not fit into max_length=16"):
        fast(max_length=16)(left_padded([17])["input_ids"])


def test_memory_that_runs_out_leaves_the_cache_as_it_was(monkeypatch):
    model, past = fast(), fast().new_cache()
    model(**left_padded([5]), past_key_values=past, logits_to_keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(Buffer, "resize", out_of_memory)
        with pytest.raises(MemoryError):
            model(**left_padded([300]), past_key_values=past, logits_to_keep=1)
    assert past.state.columns == 5
    assert_counts_agree(past.state)


def out_of_memory(*args):
    """Fail as an allocator does."""
    raise MemoryError


def test_padding_does_not_count_towards_max_length():
    model, past = fast(max_length=16), fast(max_length=16).new_cache()
    model(**left_padded([16, 2]), past_key_values=past)
    with pytest.raises(CapacityExceeded, match="17 tokens do not fit"):
        model(torch.full((2, 1), 5), past_key_values=past)


@pytest.mark.parametrize("policy", ["kivi window", "streaming"])
def test_crop_is_refused_by_name(policy):
    state = read(policy, (50,), 1).state
    with pytest.raises(UnsupportedOperation) as caught:
        state.crop(9)
    assert repr(fast(policy).plan.policy) in str(caught.value)
    assert "use kvfx.Full()" in str(caught.value)


def test_crop_moves_every_count_back():
    past = read("full", (9, 4), 12)
    columns = past.get_seq_length()
    past.crop(columns - 5)
    assert past.state.positions == [9 + 3 + 1 + 7, 4 + 3 + 5 + 7]
    assert_counts_agree(past.state)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_that_were_taken_continue_as_they_were(policy):
    model, past = fast(policy), read(policy, (3, 70, 33), 5)
    order = torch.tensor([2, 0, 2, 1])
    past.reorder_cache(order)
    assert past.state.positions[0] == past.state.positions[2]
    _decode(model, past, 4, 12)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "streaming kivi"])
def test_a_long_chat_compiles_nothing_after_the_first_turns(policy):
    """600 decoded tokens cross several buckets, with turns of other lengths between them."""
    torch._dynamo.reset()
    model = kvfx.compress(tiny_llama(head_dim=32), POLICIES[policy], verify=False)
    talk, past = left_padded([2000])["input_ids"], model.new_cache()

    def step(start: int, rows: int) -> int:
        model(talk[:, start : start + rows], past_key_values=past, logits_to_keep=1)
        return start + rows

    at = step(0, 40)
    for rows in (1, 17, 1, 30, *[1] * 30):
        at = step(at, rows)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for turn in range(4):
            at = step(at, 23 + 40 * turn)
            for _ in range(150):
                at = step(at, 1)
        past = model.new_cache()
        step(0, 333)
    assert counters["stats"]["unique_graphs"] == compiled
