"""What becomes of a Gaussian under an activation: closed forms, quadrature, and the table of what is known."""
