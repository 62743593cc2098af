"""What comes in: batches of a loader, the inputs in them, and checks of their values."""
