"""How fast the operators are, always as a ratio to a peer measured in the same run."""
