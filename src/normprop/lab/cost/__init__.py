"""What normalising costs: training, inference and memory of one network under several normalisers, in turns."""
