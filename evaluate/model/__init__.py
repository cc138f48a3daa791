"""Every layer's transcoder of one run name, together: what replaces all MLPs of a language model."""
