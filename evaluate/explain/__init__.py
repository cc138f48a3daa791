"""Explanations of latents by a language model behind an OpenAI-compatible endpoint, and how well they predict."""
