"""What a run does on text, for tools that take no weights: delphi's cache of activations, Neuronpedia's folder."""
