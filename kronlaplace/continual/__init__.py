"""Continual learning: what was learned in earlier tasks as a penalty for the next."""
