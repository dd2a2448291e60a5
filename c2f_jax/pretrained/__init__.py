"""Published weights: files as published to Orbax checkpoints with a card, without PyTorch."""
