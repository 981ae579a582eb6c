"""Backends: what one is (`base`), and those that there are."""
