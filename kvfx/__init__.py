"""kvfx: a compiler that rewrites a decoder's attention onto a compressed KV cache."""

from kvfx.compress import compress, explain
from kvfx.policies import KIVI, Full, PerLayer, StreamingLLM, policy_named

__version__ = "0.1.0"
__all__ = ["KIVI", "Full", "PerLayer", "StreamingLLM", "compress", "explain", "policy_named"]
