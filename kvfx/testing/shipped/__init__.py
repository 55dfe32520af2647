"""What is compiled offline, and what came out: `python -m kvfx.testing.shipped` prints the table.

Each kernel room has a module here with `VARIANTS`: names and calls of launchers on meta tensors.
`elements(note)`, where a room has it, is the number of elements of keys and values that one thread
handles in one iteration of a launch's innermost loop.
"""
