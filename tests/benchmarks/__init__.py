"""The benchmarks' own rules: what they make and how they measure."""
