"""What the coordinator's ledger is made of, subject by subject; see `ledger`."""
