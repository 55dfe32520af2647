"""Measurements that users can repeat: correctness first, then time and bytes of every contender."""
