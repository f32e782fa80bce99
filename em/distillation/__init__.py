"""Teacher and student: the corpora, the loop, the diagnostics."""
