"""Who can read a model, and who holds which key."""
