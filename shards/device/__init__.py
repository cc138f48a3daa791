"""What a store's rows pass through on a GPU: on their way out of the model, and into training."""
