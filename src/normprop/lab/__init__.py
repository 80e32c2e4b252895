"""The paper's experiments and fair comparisons: data sets, networks, normalisers and one training loop."""
