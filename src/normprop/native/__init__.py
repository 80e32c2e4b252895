"""Arithmetic on filters in C, for the CPU: compiled when it is first used, and done without where it can't be."""
