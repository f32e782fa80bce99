"""What a run would need on a GPU, worked out without one: the dry run of the scripts."""
