"""Training: natural gradients against the optimizers that people use, by step and by second."""
