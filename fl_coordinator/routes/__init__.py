"""What the control API answers, subject by subject; see `control`."""
