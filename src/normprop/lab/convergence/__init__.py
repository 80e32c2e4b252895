"""Runs to the end of training, as a queue that goes on where it stopped."""
