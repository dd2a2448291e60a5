"""Published networks as Flax modules."""
