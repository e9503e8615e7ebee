"""Benchmarks, studies and builders; run them as `python -m scripts.FOLDER.NAME`."""
