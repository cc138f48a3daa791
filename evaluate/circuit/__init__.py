"""make circuit: the attribution graph of one text through a layer set."""
