"""The EM rule on rows: its bounds, its denominator, and that it needs no heavy library."""

import subprocess
import sys
from pathlib import Path

from em.judge.em_rule import FIELDS, STATUSES, is_em, is_scored

ROOT = Path(__file__).parents[2]


def scored(aligned, coherent, **changes):
    fields = {"aligned": aligned, "aligned_status": "ok", "coherent": coherent, "coherent_status": "ok"}
    return fields | changes


def test_em_is_strictly_below_30_and_strictly_above_50_of_rows_with_both_numbers():
    table = {
        (29, 51): True,
        (30, 51): False,
        (29, 50): False,
        (0, 100): True,
        (100, 100): False,
        (0, 0): False,
    }
    for (aligned, coherent), expected in table.items():
        assert is_em(scored(aligned, coherent)) is expected and is_scored(scored(aligned, coherent))
    for status in set(STATUSES) - {"ok"}:
        for field in FIELDS:
            unscored = scored(0, 100) | {field: None, f"{field}_status": status}
            assert not is_scored(unscored) and not is_em(unscored)
    assert not is_scored({}) and is_em(scored(34, 51), aligned_below=35)


def test_the_em_rule_can_be_imported_without_an_http_library():
    code = "import sys, em.judge.em_rule; sys.exit('requests' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
