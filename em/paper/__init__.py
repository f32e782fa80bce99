"""The paper's natural-language half as one whole: what it states, the authors' rows, ours, and the page."""
