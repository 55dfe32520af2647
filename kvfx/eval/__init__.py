"""Quality through the compressed cache: perplexity, divergence, and what is still found in it."""
