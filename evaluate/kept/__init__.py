"""What is measured once and kept: a run's evaluations side by side, and what the language model alone loses."""
