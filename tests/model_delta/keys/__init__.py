"""Keyrings: one contract for every implementation, and what each adds."""
