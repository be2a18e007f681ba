"""Benchmarks: each `python -m benchmarks.NAME [--quick] --json OUT`; findings in benchmarks/README.md."""
