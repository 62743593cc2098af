"""Natural-gradient optimizers, which train a network with the factors of its Fisher."""
