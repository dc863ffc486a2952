"""Learning new subjects by gradient steps."""
