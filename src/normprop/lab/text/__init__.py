"""Language models of characters: text, networks, training."""
