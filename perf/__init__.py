"""Measurements: how they are made and why they can be trusted is in METHOD.md."""
