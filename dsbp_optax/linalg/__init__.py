"""Arithmetic on plain arrays; knows no parameters, no layers and no steps."""
