"""The testing helpers: they have to be able to fail."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from kvfx.testing.numerics import assert_as_accurate_as, rounding_step
from kvfx.testing.poison import poison_beyond, poisoned_empty
from kvfx.testing.text import LENGTHS, count, pass_key_prompt, passages, prompts
from kvfx.testing.tiny import TINY, left_padded, tiny, tiny_gemma3, tiny_llama


@pytest.fixture
def product():
    a, b = torch.randn(63, 100, dtype=torch.float64), torch.randn(100, 65, dtype=torch.float64)
    return a.bfloat16() @ b.bfloat16(), a.bfloat16().double() @ b.bfloat16().double()


def test_accurate_enough(product):
    low, truth = product
    assert_as_accurate_as(truth.bfloat16(), low_precision=low, truth=truth)
    assert_as_accurate_as(low, low_precision=low, truth=truth)


def spoil_nan(out):
    out[3, 5] = float("nan")


def spoil_one(out):
    out[3, 5] += 1.0


def spoil_many(out):
    out *= 1.01


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_nan, r"largest error nan .* worst at \(3, 5\): nan"),
        (spoil_one, r"largest error .* worst at \(3, 5\)"),
        (spoil_many, "root mean square"),
    ],
)
def test_not_accurate_enough(product, spoil, message):
    low, truth = product
    out = truth.bfloat16()
    spoil(out)
    with pytest.raises(AssertionError, match=message):
        assert_as_accurate_as(out, low_precision=low, truth=truth)


def test_other_shapes_and_other_truths(product):
    low, truth = product
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate_as(low[:1], low_precision=low, truth=truth)
    with pytest.raises(AssertionError, match="float64"):
        assert_as_accurate_as(low, low_precision=low, truth=truth.float())
    with pytest.raises(AssertionError, match="not finite"):
        assert_as_accurate_as(low, low_precision=low * float("nan"), truth=truth)


def test_rounding_step():
    assert rounding_step(torch.bfloat16) == 2**-8


def test_poison(poison):
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()
    assert torch.ones(3, dtype=torch.float16).new_empty(2, 2).isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 255).all()
    assert torch.empty(2, dtype=torch.bool).all()
    assert not torch.zeros(3).isnan().any()


def test_poison_ends():
    with poisoned_empty():
        pass
    assert not (torch.empty(1000) * 0).isnan().all()


def test_poison_beyond():
    cache = torch.ones(2, 2, 5, 3)
    length = torch.tensor([[0, 5], [2, 3]], dtype=torch.int32)
    live = poison_beyond(cache, length).isfinite().all(-1)
    assert torch.equal(live.sum(-1), length.long())
    assert live[1, 0].tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("architecture", TINY)
def test_tiny(architecture):
    model = tiny(architecture)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    logits = model(**left_padded((20, 13))).logits
    assert logits.shape == (2, 20, 99)
    assert logits.isfinite().all()
    # the past matters: another first token changes the last row's logits
    rows = left_padded((20, 13))
    rows["input_ids"][0, 0] += 1
    assert (model(**rows).logits[0, -1] - logits[0, -1]).abs().max() > 1e-3


def test_tiny_is_seeded():
    before = torch.random.get_rng_state()
    one, same, other = tiny("llama"), tiny("llama"), tiny("llama", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_tiny_changes():
    assert tiny_llama(kv_heads=1, layers=3).config.num_key_value_heads == 1
    assert tiny_gemma3(window=7).config.sliding_window == 7
    with pytest.raises(ValueError, match="'lama' is not in the table"):
        tiny("lama")


def test_left_padded():
    rows = left_padded((3, 5, 1))
    assert rows["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert torch.equal(rows["input_ids"] > 0, rows["attention_mask"].bool())


@pytest.mark.slow
def test_prompts(smollm2):
    _, tokenizer = smollm2
    texts = prompts(tokenizer)
    counts = [count(tokenizer, text) for text in texts]
    assert len(set(texts)) == len({text[:20] for text in texts}) == 20
    assert all(0.8 * most - 2 <= n <= most for n, most in zip(counts, LENGTHS, strict=True)), counts
    assert min(counts) >= 3
    assert len(passages()) > 40


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_pass_key_is_found(smollm2, depth):
    model, tokenizer = smollm2
    text = pass_key_prompt(tokenizer, 400, depth, "71432")
    assert 320 <= count(tokenizer, text) <= 405
    rows = tokenizer(text, return_tensors="pt")
    out = model.generate(**rows, max_new_tokens=8, do_sample=False)
    assert "71432" in tokenizer.decode(out[0, rows["input_ids"].shape[1] :])


class Words(PreTrainedTokenizerBase):
    """A tokenizer of one token a word."""

    def __call__(self, text):
        return {"input_ids": text.split()}


def test_pass_key_prompt_refuses():
    with pytest.raises(ValueError, match=r"depth=1\.5"):
        pass_key_prompt(Words(), 100, 1.5)
    with pytest.raises(ValueError, match="tokens=9: the key and the question alone need"):
        pass_key_prompt(Words(), 9, 0.5)


def test_pass_key_prompt_depth():
    texts = [pass_key_prompt(Words(), 300, depth).split() for depth in (0.0, 0.5, 1.0)]
    first, middle, last = (text.index("71432.") for text in texts)
    assert first < 10 < 100 < middle < 200 < 260 < last
