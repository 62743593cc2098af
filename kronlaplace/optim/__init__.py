"""Natural-gradient optimizers."""
