"""What tests of allocators share: a small model, and what was measured of it."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx.calibration import Calibration
from kvfx.capture import capture
from kvfx.pass_manager import run_passes
from kvfx.passes.pipeline import raise_passes
from kvfx.testing.tiny import VOCAB, tiny_llama

LAYERS = 5


@pytest.fixture(scope="session")
def small():
    """A Llama of five layers whose attention differs from layer to layer."""
    model = tiny_llama(layers=LAYERS, head_dim=32)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.weight.mul_(0.5 + 0.5 * index)
    return model


@pytest.fixture(scope="session")
def fast(small):
    """The small model with a dense cache."""
    return kvfx.compress(small, kvfx.Full(), compile=False, verify=False)


@pytest.fixture(scope="session")
def calibration(small) -> Calibration:
    """Two prompts of 128 tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB, (128,), generator=generator) for _ in range(2)]
    return kvfx.calibrate(small, prompts, tokens=128)


@pytest.fixture(scope="session")
def sites(small):
    """What the compiler finds in the small model."""
    return run_passes(capture(small), raise_passes(), None).sites
