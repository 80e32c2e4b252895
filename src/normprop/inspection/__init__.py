"""What every tensor of a network should be, and what it is."""
