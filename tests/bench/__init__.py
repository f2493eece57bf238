"""Benchmarks: run by hand or `make bench`, never collected by pytest. Each prints ratios of things measured in one run."""
