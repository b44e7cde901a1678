"""Speed and memory of the library, as ratios to one training step's forward and backward."""
