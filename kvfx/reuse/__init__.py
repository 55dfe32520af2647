"""Reuse of keys and values across contexts and requests: segments, and the store that has them."""
