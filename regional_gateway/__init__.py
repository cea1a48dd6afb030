"""The program that runs in a region: it answers inference requests and hands plans and model bytes to devices."""
