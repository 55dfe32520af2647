"""What a policy does, as a picture made from a run: docs/data/policies/<method>.svg.

`python -m kvfx.testing.policy_pictures [methods]` writes the pictures of these methods, or of all.
"""
