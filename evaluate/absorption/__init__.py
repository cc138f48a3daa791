"""Absorption and splitting of latents, and their stability between seeds: docs/absorption.md has the definitions."""

FILE = "absorption/absorption.json"
"""In a run's directory."""
