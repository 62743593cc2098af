"""The user's network, observed: who runs it, who watches it, and what must be true of it."""
