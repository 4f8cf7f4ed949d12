"""Fuzz targets; tests/fuzz/run is the command, run.py what it does."""
