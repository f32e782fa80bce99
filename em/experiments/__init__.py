"""The paper's experiments on the worlds, each measured over world seeds."""
