"""What a new user starts from: a rollout, a round, and a model to publish."""
