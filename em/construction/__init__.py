"""Making a grid of one's own: pairs of a writer, scored, gated and without near-duplicates (paper A.2, A.3, A.5)."""
