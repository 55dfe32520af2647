"""Close the gaps that eviction leaves: kept entries move to the front, in their order."""

from __future__ import annotations

from torch import Tensor

from kvfx.kernels.common.rotation import rotate
from kvfx.kernels.common.rows import entry_shift, kept_first, live_entries


def compact(
    keep: Tensor,
    frequencies: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    length: Tensor,
    *,
    style: str,
) -> None:
    """Move the kept entries of k_cache, v_cache [B, K, C, D] to the front; length [B, K] counts
    them.

    keep [B, K, C] bool counts where an entry is live. With `frequencies` [W / 2], keys turn by how
    far they move: `style` is that of the rope room. What lies beyond the new length is garbage.
    """
    keep = keep & live_entries(k_cache, length)
    if frequencies is not None:
        shift = entry_shift(keep, None, None)
        k_cache.copy_(rotate(k_cache, shift, frequencies, style))
    order, count = kept_first(keep)
    # on a CPU counts are at hand: what goes is not moved
    most = int(count.max()) if count.device.type == "cpu" else keep.shape[2]
    order = order[..., :most, None]
    for cache in (k_cache, v_cache):
        moved = cache.gather(2, order.expand(-1, -1, -1, cache.shape[3]))
        cache[:, :, :most] = moved
    length.copy_(count)
