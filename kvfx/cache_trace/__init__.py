"""Which tokens a cache holds, and how, after every step: `fast.trace_cache(prompt_ids)`."""
