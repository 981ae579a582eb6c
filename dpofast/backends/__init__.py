"""Backends: what one is (`dpofast.backends.base`), those that there are, and a door for more."""

from dpofast.backends.registry import register

__all__ = ["register"]
