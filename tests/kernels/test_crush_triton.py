"""The crush kernels: the same choice as the reference, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvfx.errors import UnsupportedShape
from kvfx.kernels.crush import reference
from kvfx.kernels.crush import triton as kernels
from kvfx.kernels.crush.configs import INTERPRETED
from kvfx.kernels.select.reference import select_recent, select_top

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFAULTS = {
    "sinks": 1, "recent": 2, "share": 0.0, "ratio": 0.25, "anchor": "mean", "bits": "half",
    "pick": "linspace", "page": 1, "seed": 0,
}  # fmt: skip


def assert_same(
    score: Tensor, keep: Tensor, live: Tensor, position: Tensor | None = None, **changed
) -> None:
    """Pass when kernels and reference keep the same rows."""
    how = {**DEFAULTS, **changed}
    found = kernels.refine(score, keep, live, position, **how)
    assert found.dtype == torch.bool
    assert torch.equal(found, reference.refine(score, keep, live, position, **how))
    assert torch.equal(found.sum(-1), keep.sum(-1))


def prompt(heads: int, rows: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, H2O's choice and live rows of two prompts; the last is padded."""
    score = torch.rand(batch, heads, rows, device=DEVICE)
    live = torch.ones(batch, heads, rows, dtype=torch.bool, device=DEVICE)
    live[-1, :, : rows // 5] = False
    return score, select_top(score, live, live.sum(-1) // 2, 1, 2), live


def ragged(heads: int, rows: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A cache whose heads hold different tokens, and different numbers of them; garbage behind."""
    position = torch.rand(batch, heads, rows + rows // 2, device=DEVICE).argsort(-1)[..., :rows]
    length = torch.randint(rows // 2, rows + 1, (batch, heads, 1), device=DEVICE)
    length[0, 0], length[-1, -1] = 0, rows
    live = torch.arange(rows, device=DEVICE) < length
    position = position.sort(-1).values.masked_fill(~live, 2**31 - 1).int()
    score = torch.rand(batch, heads, rows, device=DEVICE).masked_fill(~live, math.nan)
    return score, select_top(score, live, length[..., 0] * 2 // 3, 1, 2), live, position


@pytest.mark.parametrize("anchor", ["mean", "random", "ones"])
@pytest.mark.parametrize("rows", [1, 32, 33, 70], ids="T={}".format)
@pytest.mark.parametrize("heads", [1, 3], ids="K={}".format)
def test_prompts(heads, rows, anchor, poison):
    inputs = prompt(heads, rows)
    assert_same(*inputs, anchor=anchor, seed=3)
    assert_same(*inputs, anchor=anchor, bits="keepset", pick="stride", ratio=1 / 3, share=0.2)


@pytest.mark.parametrize("anchor", ["mean", "random"])
@pytest.mark.parametrize("heads", [32, 33], ids="K={}".format)
def test_words_of_many_heads(heads, anchor, poison):
    """32 bits are a word: its sign bit, and the last word's free bits, count as any other."""
    assert_same(*prompt(heads, 21, batch=1), anchor=anchor, ratio=0.5)


@pytest.mark.parametrize("heads", [1, 31, 32, 40], ids="K={}".format)
def test_bits_are_counted(heads, poison):
    """The packed distance is the naive one, bit for bit."""
    rows = torch.arange(35, device=DEVICE)
    bits = torch.rand(1, heads, heads, 35, device=DEVICE) < rows / 35
    bits[..., 1] = True
    padded = torch.nn.functional.pad(bits.long(), (0, 0, 0, -heads % 32)).unflatten(2, (-1, 32))
    words = (padded << rows[:32, None]).sum(3).int()
    candidates = (rows != 7).expand(1, heads, -1).contiguous()
    for anchor in (bits.new_zeros(heads), bits.new_ones(heads), bits[0, 0, :, 20]):
        found = kernels.distances(words, candidates, anchor.int(), None, INTERPRETED)
        wanted = (bits != anchor[:, None]).sum(2).masked_fill(~candidates, kernels.FAR)
        assert torch.equal(found.long(), wanted)


@pytest.mark.parametrize("bits", ["half", "keepset"])
@pytest.mark.parametrize("anchor", ["mean", "alternating"])
@pytest.mark.parametrize("rows", [1, 32, 41], ids="T={}".format)
def test_caches_of_different_tokens(rows, anchor, bits, poison):
    assert_same(*ragged(3, rows), anchor=anchor, bits=bits, ratio=0.5)


def test_more_heads_than_a_word_searched(poison):
    assert_same(*ragged(33, 7, batch=1), recent=0, ratio=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_scores(dtype, poison):
    score, keep, live = prompt(2, 70)
    assert_same(score.to(dtype), keep, live)


@pytest.mark.parametrize("bits", ["half", "keepset"])
def test_scores_that_are_no_numbers(bits, poison):
    """Ties, infinities, NaN and both zeros; a base that knows no scores; holes."""
    values = torch.tensor([math.nan, -math.inf, math.inf, -1.0, 0.0, -0.0, 1.0, 1e-40])
    score = values[torch.randint(8, (2, 3, 75))].to(DEVICE)
    live = torch.rand(2, 3, 75, device=DEVICE) < 0.8
    for keep in (select_recent(live, live.sum(-1) // 2, 1), live & (score > -1)):
        for pick in ("linspace", "stride"):
            assert_same(score, keep, live, bits=bits, pick=pick, ratio=0.5)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 1.0])
def test_nobody_and_everybody_elected(ratio, poison):
    score, keep, live = prompt(2, 65)
    assert_same(score, keep, live, ratio=ratio)
    assert_same(score, live, live, ratio=ratio)
    assert_same(score, torch.zeros_like(live), live, ratio=ratio)
    if ratio == 0:
        found = kernels.refine(score, keep, live, None, **{**DEFAULTS, "ratio": ratio})
        assert torch.equal(found, keep)


def test_operands_may_be_expanded_or_strided(poison):
    """Live rows are often one per row of the batch, read as one per head."""
    score = torch.rand(2, 50, 3, device=DEVICE).transpose(1, 2)
    live = torch.arange(50, device=DEVICE) >= torch.tensor([[0], [9]], device=DEVICE)
    live = live[:, None].expand(-1, 3, -1)
    keep = select_top(score, live, live.sum(-1) // 3, 1, 2)
    position = torch.arange(50, device=DEVICE, dtype=torch.int32).expand(2, 3, -1)
    for bits in ("half", "keepset"):
        assert_same(score, keep.mT.contiguous().mT, live, bits=bits)
        assert_same(score, keep, live, position, bits=bits)


def test_refusals():
    score, keep, live = prompt(1, 8)
    with pytest.raises(UnsupportedShape, match=r"one by one, not in pages of 16"):
        kernels.refine(score, keep, live, None, **{**DEFAULTS, "page": 16})
    with pytest.raises(UnsupportedShape, match=r"fp32, fp16 or bf16, not torch.float64"):
        kernels.refine(score.double(), keep, live, None, **DEFAULTS)
    many = torch.empty(1, 40_000, 1, device="meta")
    assert (
        kernels.constraint("refine", many) == "a distance of 40000 heads does not fit into 16 bits"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4096, 32768, 131072])
def test_long_rows(rows):
    assert_same(*prompt(8, rows), recent=32)
    assert_same(*ragged(8, rows), recent=32)
