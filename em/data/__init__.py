"""The natural-language grid: its cells, its rows, and what a run was trained on."""
