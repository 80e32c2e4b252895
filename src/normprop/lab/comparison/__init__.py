"""Normalisers compared over grids of settings."""
