"""The numerical step: losses, exact gradients (dense and sparse), Adam, learning rate."""
