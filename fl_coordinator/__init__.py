"""The program in the middle: releases, rollouts, federated rounds, and the ledger that remembers them."""
