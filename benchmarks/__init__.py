"""Benchmarks of kvpack."""
