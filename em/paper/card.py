"""Each process of `make -j` on a GPU of its own: `make paper GPUS=0,1,2,3`.

    python -m em.paper.card 0,1,2,3 -- python train.py …

waits for a card that no other process so started has, sets CUDA_VISIBLE_DEVICES to it, and becomes the
command. The card is locked until that ends, however it ends, for this user on this machine. A card that
something else computes on is not known to be taken.
"""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

from em.errors import UserError
from em.lock import FolderLock

FOLDER = Path(tempfile.gettempdir()) / f"em-cards-{os.getuid()}"
PAUSE = 0.5  # seconds between two looks at the cards


def free_card(cards: list[str]) -> tuple[str, FolderLock]:
    """The first of `cards` that is not locked, locked now; waits for one."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    while True:
        for card in cards:
            with contextlib.suppress(UserError):  # another process has it
                return card, FolderLock(FOLDER / f"card-{card}")
        time.sleep(PAUSE)


def main(argv: list[str]) -> int:
    cards = [card.strip() for card in argv[0].split(",")] if argv else []
    if argv[1:2] != ["--"] or len(argv) < 3 or not all(cards) or any("/" in card for card in cards):
        print("error: python -m em.paper.card CARD,CARD,… -- COMMAND", file=sys.stderr)
        return 2
    try:
        card, lock = free_card(cards)
        lock.hand_over()
        os.environ["CUDA_VISIBLE_DEVICES"] = card
        os.execvp(argv[2], argv[2:])
    except OSError as error:
        print(f"error: {error.filename or argv[2]}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
