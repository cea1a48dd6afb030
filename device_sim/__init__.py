"""Fleets in virtual time and real fleets: payments, populations, radio links, faults, and the programs under load."""
