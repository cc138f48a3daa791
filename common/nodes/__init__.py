"""The machines of one run: which process this is, and on which machine, from the environment that its launcher set."""
