"""The Fisher of a network: its estimation from data, its blocks together, and what is known of its origin."""
