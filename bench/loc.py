"""Lines of the tracked Python files by folder: code, docstrings, comments, blank (`make loc`).

A line counts once: as docstring where one covers it, else as blank or comment where it is nothing more.
"""

import ast
import subprocess
from collections import Counter
from pathlib import Path

COLUMNS = ("files", "lines", "code", "docstrings", "comments", "blank")
NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def count(text: str) -> Counter:
    documented = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, NODES) and ast.get_docstring(node, clean=False) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    counts = Counter(files=1)
    for number, line in enumerate(text.splitlines(), 1):
        counts["lines"] += 1
        if number in documented:
            counts["docstrings"] += 1
        elif not line.strip():
            counts["blank"] += 1
        else:
            counts["comments" if line.lstrip().startswith("#") else "code"] += 1
    return counts


def main() -> None:
    folders: dict[str, Counter] = {}
    for name in subprocess.check_output(["git", "ls-files", "*.py"], text=True).split():
        parts = Path(name).parts
        # em and each of its packages; the scripts; tests and bench as a whole.
        folder = str(Path(name).parent) if parts[0] == "em" else parts[0] if len(parts) > 1 else "scripts"
        folders.setdefault(folder, Counter()).update(count(Path(name).read_text(encoding="utf-8")))
    folders["all"] = sum(folders.values(), Counter())
    print(f"{'':<18}" + "".join(f"{column:>12}" for column in COLUMNS))
    for folder, counts in folders.items():
        print(f"{folder:<18}" + "".join(f"{counts[column]:>12,}" for column in COLUMNS))


if __name__ == "__main__":
    main()
