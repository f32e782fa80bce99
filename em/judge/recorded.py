"""A judge that has judged already: its score rows in a file, matched to responses by their identity."""

from collections.abc import Iterable, Iterator

from em.judge.responses import identity


class Recorded:
    """Score rows of one judge (of `read_scored`), given out again for the responses that they are of."""

    def __init__(self, name: str, rows: Iterable[dict]):
        self.identity = name
        self._rows = {identity(row): row for row in rows}

    def knows(self, row: dict) -> bool:
        return identity(row) in self._rows

    def score(self, rows: Iterable[dict]) -> Iterator[dict]:
        """The score row of each response that the judge knows, in order; others are left out."""
        return (self._rows[identity(row)] for row in rows if self.knows(row))
