"""Normalisation sites: effective weights and biases computed from parameters, by whichever engine fits."""
