"""Parts of a training step besides loss and optimizer: sharding, recomputation, low-precision weights, LoRA, EMA."""
