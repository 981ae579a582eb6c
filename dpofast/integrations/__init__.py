"""dpofast inside other trainers. Nothing is imported or patched until a module of this package is asked for."""
