"""The problems of `benchmarks/default.py`, and who judges what a run returns."""
