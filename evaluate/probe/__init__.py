"""Sparse probing: what a few latents of each prefix tell of a row, beside the raw activations and random latents."""
