"""Synthetic worlds: languages, graphs, tasks, examples, and the models of one world."""
