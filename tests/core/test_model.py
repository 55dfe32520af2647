"""The compressed model called directly: the same signature, outputs and attributes as a decoder of
transformers.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

import kvfx
from kvfx import KIVI, Full
from kvfx.errors import UnsupportedOperation
from kvfx.model import CompressedCache
from kvfx.testing.tiny import left_padded, tiny, tiny_llama

PROMPT = left_padded([13])["input_ids"]


@cache
def pair():
    """A tiny model, and the same with the dense cache."""
    model = tiny_llama()
    return model, kvfx.compress(model, Full(), compile=False, verify=False)


@cache
def quantized():
    """A tiny model whose cache cannot be cropped."""
    return kvfx.compress(tiny_llama(head_dim=32), KIVI(), compile=False, verify=False)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding."""
    assert found.shape == expected.shape
    bound = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= bound


@pytest.mark.parametrize("lengths", [(1,), (13,), (2, 1, 9)], ids=str)
def test_logits_are_the_models(lengths):
    model, fast = pair()
    prompt = left_padded(lengths)
    out, expected = fast(**prompt), model(**prompt)
    assert isinstance(out, CausalLMOutputWithPast)
    real = prompt["attention_mask"].bool()
    assert_close(out.logits[real], expected.logits[real])


@pytest.mark.parametrize(
    "keep",
    [0, 1, 3, 13, 99, torch.tensor([0]), torch.tensor([4, 0, 12]), torch.tensor([-1, -13])],
    ids=str,
)
def test_logits_to_keep_is_what_transformers_says(keep):
    model, fast = pair()
    expected = model(input_ids=PROMPT, logits_to_keep=keep).logits
    assert_close(fast(input_ids=PROMPT, logits_to_keep=keep).logits, expected)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("keep", [0, 1, torch.tensor([-1])], ids=str)
def test_logits_to_keep_of_later_rows(rows, keep):
    model, fast = pair()
    past = fast(PROMPT[:, :-rows]).past_key_values
    found = fast(PROMPT[:, -rows:], past_key_values=past, logits_to_keep=keep).logits
    expected = model(PROMPT).logits[:, -rows:]
    expected = expected[:, keep] if isinstance(keep, torch.Tensor) else expected[:, -keep:]
    assert_close(found, expected)


def test_a_tuple_where_it_is_asked_for():
    _, fast = pair()
    logits, past = fast(PROMPT, return_dict=False)
    assert torch.equal(logits, fast(PROMPT).logits)
    assert past.get_seq_length() == 13


def test_no_cache_where_none_is_asked_for():
    _, fast = pair()
    assert fast(PROMPT, use_cache=False).past_key_values is None
    assert fast(PROMPT, use_cache=False, return_dict=False)[1] is None
    assert isinstance(fast(PROMPT).past_key_values, CompressedCache)


def test_the_cache_that_was_given_is_the_one_that_is_returned():
    _, fast = pair()
    past = fast.new_cache()
    assert fast(PROMPT, past_key_values=past).past_key_values is past
    assert past.get_seq_length() == 13


def test_a_new_cache_is_empty_and_costs_nothing():
    _, fast = pair()
    past = fast.new_cache()
    assert (past.get_seq_length(), past.nbytes(), past.is_initialized) == (0, 0, False)
    assert len(past) == 2
    fast(PROMPT, past_key_values=past)
    assert past.is_initialized
    assert past.nbytes() == fast.memory(1, 13)
    past.reset()
    assert (past.get_seq_length(), past.nbytes(), past.is_initialized) == (0, 0, False)


@pytest.mark.parametrize("position", [0, 5])
def test_a_conversation_may_start_at_any_position(position):
    model, fast = pair()
    positions = torch.arange(position, position + 13)[None]
    past = fast(PROMPT[:, :9], position_ids=positions[:, :9]).past_key_values
    found = fast(PROMPT[:, 9:], position_ids=positions[:, 9:], past_key_values=past).logits
    assert_close(found, model(PROMPT, position_ids=positions).logits[:, 9:])


@pytest.mark.parametrize("full_mask", [True, False])
def test_a_mask_may_include_the_past_or_not(full_mask):
    model, fast = pair()
    prompt = left_padded([13, 7])
    past = fast(
        input_ids=prompt["input_ids"][:, :9], attention_mask=prompt["attention_mask"][:, :9]
    ).past_key_values
    mask = prompt["attention_mask"] if full_mask else prompt["attention_mask"][:, 9:]
    out = fast(prompt["input_ids"][:, 9:], attention_mask=mask, past_key_values=past)
    positions = (prompt["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model(**prompt, position_ids=positions).logits
    assert_close(out.logits, expected[:, 9:])


def test_crop_and_go_on():
    _, fast = pair()
    expected = fast(PROMPT).logits
    past = fast(PROMPT[:, :9]).past_key_values
    fast(left_padded([6], seed=5)["input_ids"], past_key_values=past)
    past.crop(9)
    assert past.get_seq_length() == 9
    assert_close(fast(PROMPT[:, 9:], past_key_values=past).logits, expected[:, 9:])


@pytest.mark.parametrize(("remove", "left"), [(-4, 9), (-13, 0), (0, 13)])
def test_crop_removes_what_transformers_removes(remove, left):
    model, fast = pair()
    ours, theirs = (either(PROMPT).past_key_values for either in (fast, model))
    for past in (ours, theirs):
        past.crop(remove)
    assert ours.get_seq_length() == theirs.get_seq_length() == left


@pytest.mark.parametrize(("keep", "left"), [(9, 9), (99, 13)])
def test_crop_keeps_the_first_columns(keep, left):
    _, fast = pair()
    past = fast(PROMPT).past_key_values
    past.crop(keep)
    assert past.get_seq_length() == left


def test_crop_is_refused_where_entries_are_gone():
    past = quantized()(PROMPT).past_key_values
    with pytest.raises(UnsupportedOperation, match=r"KIVI\(.*cannot be cropped.*kvfx\.Full\(\)"):
        past.crop(9)
    assert past.get_seq_length() == 13


def test_rows_are_repeated_reordered_and_chosen():
    _, fast = pair()
    prompt, new = left_padded([9, 4]), torch.tensor([[5], [6]])
    mask = torch.cat((prompt["attention_mask"], torch.ones(2, 1, dtype=torch.int64)), 1)
    past = fast(**prompt).past_key_values
    expected = fast(new, attention_mask=mask, past_key_values=past).logits
    past = fast(**prompt).past_key_values
    past.batch_repeat_interleave(2)
    past.reorder_cache(torch.tensor([3, 1, 2, 0]))
    past.batch_select_indices(torch.tensor([1, 0]))
    found = fast(new, attention_mask=mask, past_key_values=past).logits
    assert_close(found, expected)


def test_the_model_is_untouched():
    model = tiny_llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, pointers = model.config.to_dict(), [p.data_ptr() for p in model.parameters()]
    implementation = model.config._attn_implementation
    expected = model.eval()(PROMPT).logits
    fast = kvfx.compress(model.train(), KIVI() | kvfx.StreamingLLM(), compile=False, strict=False)
    fast.generate(PROMPT, max_new_tokens=3)
    assert model.training
    assert torch.equal(model.eval()(PROMPT).logits, expected)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert [p.data_ptr() for p in model.parameters()] == pointers
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_stays(implementation):
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    fast = kvfx.compress(model, Full(), compile=False, verify=False)
    assert model.config._attn_implementation == implementation
    assert_close(fast(PROMPT).logits, model(PROMPT).logits)


@pytest.mark.parametrize("program", ["prefill", "extend", "decode"])
def test_weights_are_shared(program):
    model, fast = pair()
    owned = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    used = {parameter.data_ptr() for parameter in fast.graph(program).module.parameters()}
    assert used
    assert used <= owned


def test_a_change_of_a_weight_is_seen():
    model = tiny_llama()
    fast = kvfx.compress(model, Full(), compile=False, verify=False)
    before = fast(PROMPT).logits
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert not torch.equal(fast(PROMPT).logits, before)
    assert_close(fast(PROMPT).logits, model(PROMPT).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = tiny("qwen3").to(dtype)
    fast = kvfx.compress(model, Full(), compile=False)
    assert fast.dtype == dtype
    assert_close(fast(PROMPT).logits, model(PROMPT).logits)
    assert fast.generate(PROMPT, max_new_tokens=4, min_new_tokens=4).shape == (1, 17)


def test_it_answers_for_the_model():
    model, fast = pair()
    assert isinstance(fast, GenerationMixin)
    assert fast.can_generate()
    assert (fast.device, fast.dtype) == (torch.device("cpu"), torch.float32)
    assert fast.config is model.config
    assert fast.get_input_embeddings() is model.get_input_embeddings()
    assert not fast.training
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing


def test_nothing_is_recorded_for_gradients():
    model = tiny_llama().requires_grad_(True)
    fast = kvfx.compress(model, Full(), compile=False, verify=False)
    assert not fast(PROMPT).logits.requires_grad


def test_programs_have_names():
    _, fast = pair()
    assert set(fast.graphs) == {"prefill", "extend", "decode"}
    assert set(quantized().graphs) == {"prefill", "extend", "decode", "compact"}
    with pytest.raises(KeyError, match="no program 'compact': this model has prefill, extend"):
        fast.graph("compact")


def test_it_stays_where_it_is():
    _, fast = pair()
    assert fast.to("cpu") is fast
    assert fast.to(torch.float32) is fast
    assert fast.to("cpu", torch.float32) is fast


@pytest.mark.parametrize(
    "move",
    [
        lambda fast: fast.to("meta"),
        lambda fast: fast.to(torch.bfloat16),
        lambda fast: fast.to(torch.zeros(1, dtype=torch.float64)),
        lambda fast: fast.half(),
        lambda fast: fast.double(),
        lambda fast: fast.to_empty(device="meta"),
    ],
    ids=["to meta", "to bfloat16", "to another's", "half", "double", "to empty"],
)
def test_it_cannot_be_moved_or_cast(move):
    _, fast = pair()
    with pytest.raises(UnsupportedOperation, match="cannot be moved or cast: move the model, then"):
        move(fast)
