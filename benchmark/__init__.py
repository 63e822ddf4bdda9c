"""Benchmarks: each is a command (`python -m benchmark.latency --help`) that prints figure, floor and fraction."""
