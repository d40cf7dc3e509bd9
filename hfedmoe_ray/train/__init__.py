"""One client's local work: profile, train, evaluate."""
