"""History does not matter: a sequence read whole, in pieces, padded, or after a rewind gives the
same logits; and a compressed cache is the model's own cache with exactly the entries that the
policy keeps.
"""

from __future__ import annotations

import copy
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import kvfx
from kvfx import KIVI, Full, PerLayer, StreamingLLM
from kvfx.testing.numerics import assert_as_accurate_as
from kvfx.testing.tiny import left_padded, tiny, tiny_gemma3, tiny_llama, tiny_mistral

TOKENS = 61
WINDOW = 16
MODELS = {
    "llama": tiny_llama,
    "mistral": partial(tiny_mistral, WINDOW),
    "gemma3": partial(tiny_gemma3, WINDOW),
    "qwen3": partial(tiny, "qwen3"),
}
POLICIES = {
    "kivi 2": KIVI(2, residual=32),
    "kivi 4": KIVI(4, residual=32),
    "kivi 8": KIVI(8, residual=32),
    "kivi 2 published": KIVI(2, residual=32, mode="kivi"),
    "kivi 8 published": KIVI(8, residual=32, mode="kivi"),
    "k8v4": KIVI(k_bits=8, v_bits=4, residual=0),
    "streaming": StreamingLLM(budget=0.5, interval=7),
    "streaming absolute": StreamingLLM(budget=20, interval=7, positions="absolute"),
    "streaming kivi": StreamingLLM(budget=40, interval=9) | KIVI(8, residual=32),
    "per layer": PerLayer(KIVI(2, residual=32), {0: StreamingLLM(budget=0.5, interval=5)}),
}


@cache
def dense(name: str):
    """A tiny model, the same in fp64, and the same with the dense cache."""
    model = MODELS[name]()
    truth = copy.deepcopy(model).double()
    return model, truth, kvfx.compress(model, Full(), compile=False, verify=False)


@cache
def base():
    """The model that policies are tried on: fp64, so that rounding does not flip a code."""
    return tiny_llama(head_dim=32).double()


@cache
def compressed(policy: str):
    """The model under a policy."""
    chosen = Full() if policy == "full" else POLICIES[policy]
    return kvfx.compress(base(), chosen, compile=False, verify=False)


def in_pieces(fast, prompt: dict[str, Tensor], cuts, past=None) -> Tensor:
    """Logits [B, S, V] of a batch that is read piece by piece."""
    past = fast.new_cache() if past is None else past
    start, out = past.get_seq_length(), []
    for end in (*cuts, prompt["input_ids"].shape[1]):
        mask = prompt["attention_mask"][:, :end]
        ids = prompt["input_ids"][:, start:end]
        out.append(fast(ids, attention_mask=mask, past_key_values=past).logits)
        start = end
    return torch.cat(out, 1)


def assert_whole(name: str, prompt: dict[str, Tensor], found: Tensor) -> None:
    """Logits as accurate as those of the model in one pass, by its fp64 truth."""
    model, truth, _ = dense(name)
    positions = (prompt["attention_mask"].cumsum(1) - 1).clamp(min=0)
    low, exact = (either(**prompt, position_ids=positions).logits for either in (model, truth))
    start = found.shape[1]
    real = prompt["attention_mask"].bool()[:, -start:]
    assert_as_accurate_as(
        found[real], low_precision=low[:, -start:][real], truth=exact[:, -start:][real]
    )


@st.composite
def splits(draw, first: int = 1) -> tuple[int, ...]:
    """Where to cut: some long pieces and some runs of single tokens."""
    cuts = draw(st.sets(st.integers(first, TOKENS - 1), max_size=5))
    run = draw(st.integers(first, TOKENS - 1))
    steps = draw(st.integers(0, 12))
    return tuple(sorted(cuts | set(range(run, min(run + steps, TOKENS)))))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8)
@given(cuts=splits())
def test_any_split_is_one_pass(name, cuts):
    prompt = left_padded([TOKENS])
    assert_whole(name, prompt, in_pieces(dense(name)[2], prompt, cuts))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8)
@given(cuts=splits(first=TOKENS - 9))
def test_any_split_of_a_padded_batch_is_one_pass(name, cuts):
    prompt = left_padded([TOKENS, 10, 33])
    assert_whole(name, prompt, in_pieces(dense(name)[2], prompt, cuts))


@pytest.mark.parametrize("name", MODELS)
def test_token_by_token_is_one_pass(name):
    prompt = left_padded([TOKENS])
    assert_whole(name, prompt, in_pieces(dense(name)[2], prompt, range(1, TOKENS)))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@settings(max_examples=8)
@given(keep=st.integers(1, TOKENS - 1), wrong=st.integers(2, 9))
def test_a_rewind_forgets_what_came_after(name, keep, wrong):
    fast, prompt = dense(name)[2], left_padded([TOKENS])
    past = fast(prompt["input_ids"][:, :keep]).past_key_values
    in_pieces(fast, left_padded([keep + wrong], seed=9), [keep + 1], past)
    past.crop(keep)
    assert_whole(name, prompt, in_pieces(fast, prompt, [keep + 1] if keep < 60 else [], past))


@pytest.mark.parametrize("name", POLICIES)
def test_the_first_token_is_the_dense_models_bit_for_bit(name):
    prompt = left_padded([100, 7])
    found = compressed(name)(**prompt).logits
    assert torch.equal(found, compressed("full")(**prompt).logits)


def stream(fast, lengths, rows=None, steps: int = 90, seed: int = 0) -> Tensor:
    """Logits [steps, B, V] of tokens decoded after a padded prompt; `rows` in their order."""
    rows = list(range(len(lengths))) if rows is None else rows
    prompt = left_padded(lengths, seed=seed)
    longest = max(lengths[row] for row in rows)
    mask = prompt["attention_mask"][rows][:, -longest:]
    ids = prompt["input_ids"][rows][:, -longest:]
    past = fast(ids, attention_mask=mask, logits_to_keep=1).past_key_values
    tokens = left_padded([steps] * len(lengths), seed=1)["input_ids"][rows]
    out = [fast(tokens[:, at : at + 1], past_key_values=past).logits[:, 0] for at in range(steps)]
    return torch.stack(out)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of fp32, in which kernels compute."""
    bound = torch.finfo(torch.float32).eps ** 0.5 * float(expected.abs().max())
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= bound


@pytest.mark.parametrize("name", POLICIES)
def test_a_padded_row_is_the_row_alone(name, poison):
    fast, lengths = compressed(name), (70, 11, 40)
    together = stream(fast, lengths)
    for row in range(len(lengths)):
        assert_close(together[:, row : row + 1], stream(fast, lengths, [row]))


@pytest.mark.parametrize("name", POLICIES)
def test_rows_may_stand_in_any_order(name):
    fast, lengths = compressed(name), (70, 11, 40)
    order = [2, 0, 1]
    assert_close(stream(fast, lengths, order, 45), stream(fast, lengths, steps=45)[:, order])


@pytest.mark.parametrize("name", ["streaming", "streaming absolute", "kivi 8"])
def test_a_row_that_is_not_due_keeps_its_entries(name):
    """A long turn of one row evicts there, and leaves the row beside it as it is alone."""
    fast = compressed(name)

    def second_row(rows: list[int]) -> Tensor:
        past = fast(left_padded([60, 60])["input_ids"][rows], logits_to_keep=1).past_key_values
        turn = left_padded([40, 2], seed=2)
        longest = 40 if 0 in rows else 2
        ids, mask = (turn[key][rows][:, -longest:] for key in ("input_ids", "attention_mask"))
        fast(ids, attention_mask=mask, past_key_values=past, logits_to_keep=1)
        return fast(torch.full((len(rows), 1), 5), past_key_values=past).logits[-1]

    assert_close(second_row([0, 1]), second_row([1]))


@pytest.mark.parametrize("mode", ["window", "kivi"])
def test_more_bits_are_closer_to_dense(mode):
    expected = stream(compressed("full"), [100], steps=20)
    errors = []
    for bits in (2, 4, 8):
        policy = KIVI(bits, residual=32, mode=mode)
        fast = kvfx.compress(base(), policy, compile=False, verify=False)
        found = stream(fast, [100], steps=20)
        assert found.isfinite().all()
        errors.append(float((found - expected).square().mean().sqrt()))
    # a step of 2, 4, 8 bits is 1/3, 1/15, 1/255 of a group's range: 5 and 17 times finer
    assert errors[0] > 2 * errors[1] > 16 * errors[2] > 0


class Trimmed:
    """The original model over its own cache, evicted by hand: what StreamingLLM means.

    Keeps the first `sinks` and the newest entries. With `positions="cache"` keys are turned to the
    index of their entry (complex numbers, fp64), and queries count from there.
    """

    def __init__(self, select: StreamingLLM) -> None:
        self.select, self.model = select, base()
        self.past, self.seen, self.kept = DynamicCache(config=base().config), 0, 0

    def read(self, ids: Tensor) -> Tensor:
        """Logits of new rows; afterwards what is due is evicted."""
        first, rows = self.seen == 0, ids.shape[1]
        entries = self.past.get_seq_length()
        start = self.seen if self.select.positions == "absolute" else entries
        logits = self.model(
            ids,
            position_ids=torch.arange(start, start + rows)[None],
            attention_mask=torch.ones(1, entries + rows, dtype=torch.int64),
            past_key_values=self.past,
        ).logits
        self.seen += rows
        if rows > 1:
            self.kept = self.select.kept(self.seen)
        if first or self.past.get_seq_length() >= self.kept + self.select.interval:
            self.evict()
        return logits

    def evict(self) -> None:
        """Drop all but `kept` entries."""
        entries = self.past.get_seq_length()
        recent = range(entries - (self.kept - self.select.sinks), entries)
        chosen = torch.tensor([*range(self.select.sinks), *recent])
        delta = torch.arange(len(chosen)) - chosen
        for layer in self.past.layers:
            layer.keys, layer.values = layer.keys[:, :, chosen], layer.values[:, :, chosen]
            if self.select.positions == "cache":
                layer.keys = self.turned(layer.keys, delta)

    def turned(self, keys: Tensor, delta: Tensor) -> Tensor:
        """Keys rotated by `delta` positions."""
        half = keys.shape[-1] // 2
        theta = base().config.rope_parameters["rope_theta"]
        frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(()).double(), delta[:, None] * frequency)
        pairs = torch.complex(keys[..., :half].double(), keys[..., half:].double()) * turn
        return torch.cat((pairs.real, pairs.imag), -1).to(keys.dtype)


@pytest.mark.parametrize("positions", ["cache", "absolute"])
@pytest.mark.parametrize(
    ("budget", "sinks", "interval"), [(0.25, 4, 9), (20, 4, 1), (17, 0, 5), (0.5, 1, 64)]
)
def test_streaming_llm_is_the_model_over_exactly_the_kept_entries(
    positions, budget, sinks, interval
):
    select = StreamingLLM(sinks=sinks, budget=budget, interval=interval, positions=positions)
    fast = kvfx.compress(base(), select, compile=False, verify=False)
    oracle, past = Trimmed(select), fast.new_cache()
    ids = left_padded([160])["input_ids"]
    # a prompt, steps, a turn of 13 tokens, steps
    start = 0
    for end in (70, *range(71, 100), 113, *range(114, 161)):
        found = fast(ids[:, start:end], past_key_values=past).logits
        assert_close(found, oracle.read(ids[:, start:end]))
        assert past.state.entries[fast.plan.sites[0].schedule] == [oracle.past.get_seq_length()]
        start = end
    for buffers, layer in zip(past.state.buffers, oracle.past.layers, strict=True):
        live = int(buffers["length"][0, 0])
        assert_close(buffers["v_cache"][:, :, :live], layer.values)
        assert_close(buffers["k_cache"][:, :, :live], layer.keys)


@pytest.mark.parametrize("tokens", [3, 5, 19, 20, 21, 70])
def test_the_kept_entries_of_a_prompt_are_the_sinks_and_the_newest(tokens):
    prompt = left_padded([tokens])
    kept = compressed("streaming absolute")(**prompt).past_key_values.state.buffers
    every = compressed("full")(**prompt).past_key_values.state.buffers
    chosen = [n for n in range(tokens) if n < 4 or n >= tokens - 16]
    for found, expected in zip(kept, every, strict=True):
        assert found["length"].tolist() == [[len(chosen)] * 2]
        for name in ("k_cache", "v_cache"):
            assert torch.equal(found[name][:, :, : len(chosen)], expected[name][:, :, chosen])


@pytest.mark.parametrize("positions", ["cache", "absolute"])
def test_a_short_prompt_does_not_lower_a_budget_of_entries(positions):
    """The sinks and 16 more fit: nothing may be dropped before there are more entries than that."""
    select = StreamingLLM(budget=20, interval=8, positions=positions)
    fast = kvfx.compress(base(), select, compile=False, verify=False)
    found = stream(fast, [3], steps=22)
    assert_close(found, stream(compressed("full"), [3], steps=22))
