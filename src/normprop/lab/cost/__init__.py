"""The cost of normalising: training, inference and memory of one network under several normalisers, in turns."""
