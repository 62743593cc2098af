"""What tests share: networks with data, oracles, priors, assertions."""
