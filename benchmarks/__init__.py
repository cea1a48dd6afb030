"""One script a subject; with `--json` each prints one object of claims. `python -m benchmarks.all` runs them."""
