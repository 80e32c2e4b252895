"""Built-in networks and the normalisers to compare."""
