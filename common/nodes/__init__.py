"""The machines of one run: which process this is, and where, by the environment of whoever has started it."""
