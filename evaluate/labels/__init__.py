"""Labels of latents without a language model: the words that they fire on, and how well those say where."""
