"""Which rows a mask lets see which keys, and what it adds for distance: read from its values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfx.geometry import Causal, Chunk, Mask, Window
from kvfx.graph import Miss


@dataclass(frozen=True)
class MaskFact:
    """Who sees whom, and what each head's score loses per position of distance (None: nothing)."""

    seen: Mask
    slopes: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return str(self.seen) if self.slopes is None else f"{self.seen}, slopes"


def agree(one: MaskFact, other: MaskFact) -> bool:
    """Whether two masks are the same, up to the rounding of what they add."""
    if one.slopes is None or other.slopes is None:
        return one == other
    near = torch.allclose(torch.tensor(one.slopes), torch.tensor(other.slopes), rtol=2e-2)
    return one.seen == other.seen and near


def fit_mask(mask: Tensor, rows: int) -> MaskFact | Miss:
    """The one family that a mask of `rows` unpadded rows belongs to, exactly; nothing is assumed.
    Its shape is one that broadcasts to [B, H, S, S].
    """
    mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
    if mask.dim() != 4 or mask.shape[3] != rows or mask.shape[2] not in (1, rows):
        return Miss(f"the mask is {list(mask.shape)} where rows x keys is [{rows}, {rows}]")
    if not bool((mask == mask[:1]).all()):
        return Miss("the mask differs between rows of the batch")
    if mask.dtype is torch.bool:
        hidden, slopes = ~mask[0], None
    else:
        # some models divide scores and masks alike: what is left still hides everything
        hidden = mask[0] <= torch.finfo(mask.dtype).min / 64
        bias = mask[0].double().masked_fill(hidden, 0.0)
        slopes = None if not bool(bias.any()) else fit_slopes(bias, hidden, mask.dtype)
    if isinstance(slopes, Miss):
        return slopes
    if not bool((hidden == hidden[:1]).all()):
        return Miss("the mask differs between heads")
    seen = fit_seen(~hidden[0].expand(rows, rows), rows)
    return seen if isinstance(seen, Miss) else MaskFact(seen, slopes)


def fit_seen(seen: Tensor, rows: int) -> Mask | Miss:
    """Causal, a causal window or chunk: seen is [S, S] bool."""
    index = torch.arange(rows, device=seen.device)
    distance = index[:, None] - index
    causal = distance >= 0
    if torch.equal(seen, causal):
        return Causal()
    size = int(seen[-1].sum())
    if size and torch.equal(seen, causal & (distance < size)):
        return Window(size)
    # the first row that no longer sees the first key begins the second chunk
    size = int(seen[:, 0].sum())
    if size and torch.equal(seen, causal & (index[:, None] // size == index // size)):
        return Chunk(size)
    return Miss("the mask is neither causal nor a causal window nor a causal chunk")


def fit_slopes(bias: Tensor, hidden: Tensor, dtype: torch.dtype) -> tuple[float, ...] | Miss | None:
    """What each head loses per position, where bias [H, S or 1, S] falls with distance and in no
    other way; a constant per row changes no softmax (None: nothing is lost).
    """
    rows = bias.shape[2]
    bias, hidden = bias.expand(-1, rows, -1), hidden.expand(bias.shape[0], rows, -1)
    index = torch.arange(rows, device=bias.device)
    distance = (index[:, None] - index).clamp(min=0)
    lost = (torch.diagonal(bias, dim1=1, dim2=2)[..., None] - bias).masked_fill(hidden, 0.0)
    seen = (~hidden & (distance > 0)).double()
    slopes = (lost * seen).sum((1, 2)) / (distance * seen).sum((1, 2)).clamp(min=1)
    rounding = 8 * torch.finfo(dtype).eps * float(bias.abs().max())
    error = (lost - slopes[:, None, None] * distance * seen).abs().max()
    if float(error) > rounding:
        return Miss("the mask adds a bias that is not linear in distance")
    return tuple(slopes.tolist()) if float(slopes.abs().max()) * rows > rounding else None
