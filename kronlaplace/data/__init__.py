"""Incoming data: batches of a loader, the inputs in them, and checks of their values."""
