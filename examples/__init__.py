"""Short programs on small data, each with a table and a picture: run ``python -m examples.NAME`` in a checkout."""
