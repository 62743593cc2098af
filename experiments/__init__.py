"""One module per table or figure: `python -m experiments.NAME` writes a CSV, a Markdown table and a plot."""
