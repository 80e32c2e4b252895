"""Figures by matplotlib. Each function returns the figure; nothing is shown or kept in global state."""
