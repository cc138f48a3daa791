"""The text that a split's rows stand on."""
