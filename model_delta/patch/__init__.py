"""How one model version becomes another."""
