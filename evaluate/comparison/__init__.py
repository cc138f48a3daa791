"""Several transcoders on the same rows (make compare): what is written of them."""
