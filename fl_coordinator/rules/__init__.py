"""Which updates to keep, decided from the Gram matrix alone: pure, plain NumPy."""
