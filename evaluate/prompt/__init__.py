"""A text of the user's own: which latents fire on it, token by token."""
