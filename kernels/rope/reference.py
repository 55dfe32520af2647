"""Rotary embedding by an arbitrary shift, in fp32: R(a) R(b) = R(a + b), so a rotated key moves by
its delta. Compaction turns keys as well: the definition is in `kernels/common/rotation.py`.
"""

from __future__ import annotations

from kvfx.kernels.common.rotation import rotate

__all__ = ["rotate"]
