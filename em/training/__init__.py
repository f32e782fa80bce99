"""What every training loop uses: optimiser, losses, divergences, metrics."""
