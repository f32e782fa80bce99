"""Making a grid of one's own: written pairs, scored, gated and without near-duplicates (A.2, A.3, A.5)."""
