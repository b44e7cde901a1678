"""The Fisher information of any PyTorch model: measured, explained, and used."""
