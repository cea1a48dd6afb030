"""The program on the device: it fetches, checks, runs and replaces model versions, and answers payments."""
