"""Who vouches for a model, a plan, a round or a report."""
