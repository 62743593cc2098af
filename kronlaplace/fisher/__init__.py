"""The Fisher of a network: its estimation from data, its blocks and its metadata."""
