"""MATH's training problems, from any of the forms in which they are kept (paper 4.3.1, E.4.1, E.4.2).

The hub gives out the original, hendrycks/competition_math, no more. The same ZIP is kept at MIRROR, as was
reported on 2025-02-19 (github.com/hendrycks/math/issues/29). Other mirrors on the hub are Parquet, which is
not read here; saved as JSON lines they are.
"""

import zipfile
from pathlib import Path

import requests
from tqdm import tqdm

from em.errors import MissingFile, UserError
from em.files import check, read_json, read_json_lines, write_atomic
from em.model import hub

MIRROR = "https://www.modelscope.cn/datasets/opencompass/competition_math/resolve/master/data/MATH.zip"
_ROW = {"problem": str, "solution": str}
_MORE = {"level": str | int | None, "type": str | None, "subject": str | None}


def load_math(data: str | Path) -> list[dict]:
    """MATH's training problems as rows `idx, question, answer, level, type`, ordered by subject and number.

    data: a folder with train/<subject>/<n>.json or train.jsonl, such a .jsonl file, MATH.zip, the address of
    one of these two, or a hub id that has data/MATH.zip or train.jsonl. Rows in the form of MATH-500
    (`subject`, a level without the word) are read too. Paper E.4.1 takes "the full 7.5k examples", which is
    the training split: no level or subject is left out, its filter is about what models answer. For E.4.2's
    2,000 draw from these rows. UserError where there are none.
    """
    path = _file(str(data))
    if path.suffix == ".jsonl":
        rows = [(f"{path}, line {line}", row) for line, row in read_json_lines(path)]
    else:
        try:
            root = path if path.is_dir() else zipfile.Path(path) / "MATH" / "train"
            subjects = [subject for subject in root.iterdir() if subject.is_dir()]
            files = [(subject.name, file) for subject in subjects for file in subject.iterdir()]
            files.sort(key=lambda f: (f[0], len(f[1].name), f[1].name))  # 2.json before 10.json
            rows = [(str(file), read_json(file)) for _, file in files]
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: encrypted
            raise UserError(f"{path} cannot be read as MATH ({error}); download it again") from error
    if not rows:
        raise UserError(f"{path} holds no problems; give a folder with train/<subject>/<n>.json")
    problems = []
    for idx, (where, row) in enumerate(rows):
        check(row, where, _ROW, _MORE)
        level, subject = row.get("level"), row.get("type") or row.get("subject")
        level = f"Level {level}" if isinstance(level, int) else level
        about = {"level": level or "unknown", "type": subject or "unknown"}
        problems.append({"idx": idx, "question": row["problem"], "answer": row["solution"]} | about)
    return problems


def _file(data: str) -> Path:
    """Where the problems lie, fetched where needed."""
    if data.startswith(("http://", "https://")):
        return _download(data)
    path = Path(data).expanduser()
    if path.is_dir():
        inside = (path / "train.jsonl", path / "train", path / "MATH" / "train")
        return next((candidate for candidate in inside if candidate.exists()), path)
    if path.exists():
        return path
    try:
        return hub.fetch(data, "data/MATH.zip", "dataset")
    except MissingFile:
        return hub.fetch(data, "train.jsonl", "dataset")


def _download(address: str) -> Path:
    """The file at `address`, kept in runs/downloads/ once it is whole."""
    path = Path("runs/downloads") / Path(address).name
    if path.suffix not in (".zip", ".jsonl"):
        raise UserError(f"{address} is neither a .zip nor a .jsonl file")
    if path.exists():
        return path

    blocks = []
    try:
        with requests.get(address, stream=True, timeout=60) as answer:
            answer.raise_for_status()
            size = int(answer.headers.get("content-length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
                for block in answer.iter_content(1 << 16):
                    blocks.append(block)
                    bar.update(len(block))
    except requests.RequestException as error:
        raise UserError(
            f"MATH cannot be had from {address} ({type(error).__name__}): name a copy with --math: a folder "
            "with train/<subject>/<n>.json, MATH.zip, or a train.jsonl"
        ) from error
    write_atomic(path, lambda temporary: temporary.write_bytes(b"".join(blocks)))
    return path
