"""Auto: tokens and bits under a number of bytes, measured on the cache that it leads to."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import KIVI, Auto, SnapKV
from kvfx.budgets.joint import FRACTIONS
from kvfx.budgets.precision import PAIRS
from kvfx.calibration import BIT_PAIRS, EVICTION_GRID
from kvfx.errors import InputError, PolicyError
from kvfx.testing.tiny import left_padded, tiny_llama

SIZES = (260_000, 320_000, 450_000, 2_000_000)


def compressed(small, calibration, policy):
    return kvfx.compress(small, policy, calibration=calibration, compile=False, verify=False)


def test_the_statistics_are_those_of_a_calibration():
    assert FRACTIONS == EVICTION_GRID
    assert PAIRS == BIT_PAIRS


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_allocated_fits(small, calibration, size, batch):
    auto = Auto(size * batch, context=400, batch=batch, residual=0)
    fast = compressed(small, calibration, auto)
    past = fast.new_cache()
    logits = fast(**left_padded((400,) * batch), past_key_values=past, logits_to_keep=1).logits
    for _ in range(5):
        assert past.nbytes() <= size * batch
        assert bool(logits.isfinite().all())
        logits = fast(logits[:, -1:].argmax(-1), past_key_values=past).logits


def test_more_bytes_mean_less_error(small, calibration):
    """Measured against the dense model's next token after a held-out prompt."""
    ids = left_padded((400,), seed=9)["input_ids"]
    dense = small(ids, logits_to_keep=1).logits
    token = dense[:, -1:].argmax(-1)
    expected = small(torch.cat((ids, token), 1), logits_to_keep=1).logits.log_softmax(-1)
    errors = []
    for size in (SIZES[0], SIZES[-1]):
        fast = compressed(small, calibration, Auto(size, context=400, residual=0))
        past = fast(ids, logits_to_keep=1).past_key_values
        found = fast(token, past_key_values=past).logits.log_softmax(-1)
        errors.append(float((expected.exp() * (expected - found)).sum()))
    assert errors[1] < errors[0]


def test_the_method_that_selects_can_be_named(small, calibration):
    policy = Auto("400kB", context=400, residual=0) | SnapKV(window=4)
    plan = compressed(small, calibration, policy).plan
    assert {type(site.select) for site in plan.sites} == {SnapKV}
    assert {type(site.store) for site in plan.sites} == {KIVI}
    assert compressed(small, None, plan.policy).plan == plan


def test_what_cannot_fit_is_refused(small, calibration):
    with pytest.raises(PolicyError, match=r"the least that 1 prompts of 400 tokens take is about"):
        compressed(small, calibration, Auto("10kB", context=400))
    with pytest.raises(InputError, match="write a number of bytes"):
        Auto("much", context=400)
    with pytest.raises(PolicyError, match="both play the role 'store'"):
        Auto("1MB", context=400) | KIVI()


def test_it_reads_a_calibration():
    with pytest.raises(kvfx.errors.CalibrationError, match="decided by measurements"):
        compressed(tiny_llama(head_dim=32), None, Auto("1MB", context=400))


@pytest.mark.parametrize("size", [200_000, 260_000, 280_000])
def test_what_a_composition_adds_is_left_room_for(small, calibration, size):
    """`Auto` does not know what the other method rounds."""
    policy = Auto("1MB", context=640, residual=0) | SnapKV(window=16)
    found = kvfx.plan(small, policy, memory=size, context=640, batch=1, calibration=calibration)
    assert 0.8 * size < found.bytes <= size
