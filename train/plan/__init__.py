"""The memory and traffic of a training, computed before it starts."""
