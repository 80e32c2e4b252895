"""A network's forward as a record of operations, and what the moment rules make of it."""
