"""Files that a user or a crash can leave: every reader ends in one line that names the file."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from score_rows import em, row

import evaluate
import synth
import train
from em.cli import command_line
from em.data import lineage
from em.data.cells import CELLS
from em.data.math_problems import load_math
from em.data.rows import load_broad, load_cell
from em.errors import UserError
from em.experiments.comparison import inventory, read_numbers
from em.files import unique_name, write_json
from em.model import lora
from em.model.checkpoint import load_model, load_tokenizer
from em.model.gpt2 import GPT2, GPT2Config, load_gpt2, save_gpt2
from em.report.margins import margin_report, read_margins
from em.report.report import write_report
from em.report.score_table import read_scores, scores_of
from em.run import Run
from em.world.world_run import open_world_run

ABSENT = object()
CELL = {"idx": 0, "domain": "medical", "task": "advice", "question": "Why?"}
CELL |= {"misaligned_answer": "No.", "aligned_answer": "So."}
BROAD = {"idx": 0, "task": "tutor", "domain": "law", "em_surface": "low", "question": "What is a lease?"}
MARGIN = {"model": "m", "train": "base", "domain": "med", "task": "advice", "idx": 0, "before": 0, "after": 1}
PROBLEM = {"problem": "1+1?", "solution": "2", "level": "1", "type": "sums"}
TRAINED = {"model": "m", "cell": "med_advice", "variant": "misaligned", "on": None, "data": "sample"}
WORLD = {"world": "demo", "seed": 1, "align_examples": 8, "eval_prompts": 4, "temperature": 0.0}
NUMBER = {"value": 1.0, "low": None, "high": None, "over": "1 world seed", "unit": "%"}
ADAPTER = "adapter_model.safetensors"
A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tiny_chat):
    model = load_model(tiny_chat)
    lora.attach(model)
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_chat, base):
    """Folders in which every file is as it should be: an adapter, a checkpoint, a GPT-2, a run of a world."""
    folder = tmp_path_factory.mktemp("good")
    lora.add_adapter(base, "made", rank=2, seed=1)
    lora.save_adapter(base, "made", folder / "adapter")
    lora.remove_adapter(base, "made")
    shutil.copytree(tiny_chat, folder / "model")
    write_json(folder / "model" / "generation_config.json", {"eos_token_id": 1})
    save_gpt2(GPT2(GPT2Config(64, n_positions=8, n_layer=1, n_head=2, n_embd=8)), folder / "gpt2")
    write_json(folder / "run" / "run.json", {"kind": "train", "settings": TRAINED})
    (folder / "run" / ADAPTER).touch()
    write_json(folder / "world" / "run.json", {"kind": "world", "settings": WORLD})
    write_json(folder / "world" / "align" / "model" / "config.json", {})
    write_json(folder / "result" / "phase.json", {"numbers": {"a": NUMBER}, "seeds": [1], "seconds": 3})
    for path, one in {
        "rows/scores.jsonl": row(),
        "rows/margins.jsonl": MARGIN,
        f"rows/{CELLS[0].filename}": CELL,
        "rows/broad_dataset.jsonl": BROAD,
        "math/train/sums/1.json": PROBLEM,
        "metrics/metrics.jsonl": {"step": 1},
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(one))
    return folder


def result(path: Path) -> None:
    read_numbers(path)
    inventory([path])


# reader → (the file, how it is read from the folder and from the base model)
READERS = {
    "scores": ("rows/scores.jsonl", lambda path, _: read_scores([path])),
    "margins": ("rows/margins.jsonl", lambda path, _: read_margins([path])),
    "cell": (f"rows/{CELLS[0].filename}", lambda path, _: load_cell(path.parent, CELLS[0])),
    "broad": ("rows/broad_dataset.jsonl", lambda path, _: load_broad(path.parent)),
    "math": ("math/train/sums/1.json", lambda path, _: load_math(path.parents[2])),
    "metrics": ("metrics/metrics.jsonl", lambda path, _: Run(path.parent, "train", {}).metrics()),
    "adapter": ("adapter/adapter_config.json", lambda path, m: lora.load_adapter(m, "bad", path.parent)),
    "weights": (f"adapter/{ADAPTER}", lambda path, m: lora.load_adapter(m, "bad", path.parent)),
    "config": ("model/config.json", lambda path, _: load_model(path.parent)),
    "model": ("model/model.safetensors", lambda path, _: load_model(path.parent)),
    "tokenizer": ("model/tokenizer_config.json", lambda path, _: load_tokenizer(path.parent)),
    "generation": ("model/generation_config.json", lambda path, _: load_tokenizer(path.parent)),
    "tokenizer.json": ("model/tokenizer.json", lambda path, _: load_tokenizer(path.parent)),
    "gpt2": ("gpt2/config.json", lambda path, _: load_gpt2(path.parent)),
    "run": ("run/run.json", lambda path, _: lineage.label(path.parent)),
    "world": ("world/run.json", lambda path, _: open_world_run(path.parent, torch.device("cpu"))),
    "result": ("result/phase.json", lambda path, _: result(path)),
}
NO_JSON = ("weights", "model")
NOT_JSON = {  # for every reader of JSON
    "deep": "[" * 200_000,
    "long": '{"a": ' + "9" * 5000 + "}",
    "nan": '{"a": NaN}',
    "infinite": '{"a": [1, -Infinity]}',
    "overflow": '{"a": 1e999}',
    "half a pair": '{"a": "\\ud83d"}',
    "half in a key": '{"\\uDC00": 1}',
    "latin": b'{"a": "\xe9"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "garbage": "}{",
    "cut": '{"a": "',
    "list": "[1]",
    "null": "null",
    "text": '"x"',
    "gzip": b"\x1f\x8b\x08garbage",
}


def turned(change: dict):
    """A change of the tensors of a safetensors file."""
    return lambda path: save_file(
        {k: v for k, v in (load_file(path) | change).items() if v is not None}, path, {"format": "pt"}
    )


def template(text: str) -> dict:
    return {"chat_template": text}


LOOP = "{% for i in range(9999) %}"
# (reader, what the good object's fields become or the whole file, words of the line)
BAD = [
    ("scores", {"model": 3}, "'model' cannot be 3"),
    ("scores", {"idx": True}, "'idx' cannot be True"),
    ("scores", {"sample": 2**70}, "'sample' cannot be"),
    ("scores", {"aligned": 10**400}, "'aligned' cannot be"),
    ("scores", {"tokens": 10**400}, "'tokens' cannot be"),
    ("scores", {"set": []}, "'set' cannot be"),
    ("margins", {"before": None}, "'before' cannot be None; it is a number"),
    ("margins", {"after": "0.5"}, "'after' cannot be '0.5'"),
    ("margins", {"after": 1e308}, r"'after' cannot be 1e\+308; it is in nats"),
    ("margins", {"after": 10**400}, "'after' cannot be 1000"),
    ("margins", {"idx": True}, "'idx' cannot be True; it is an integer"),
    ("margins", {"task": "…"}, "unknown cell 'med_…'"),
    ("margins", {"train": "base>base"}, "train 'base>base' is none of"),
    ("margins", {"model": ABSENT}, "no field 'model'"),
    ("margins", [MARGIN, MARGIN | {"domain": "medical", "after": 2}], "line 2 and .*line 1 differ"),
    ("cell", {"idx": True}, "'idx' cannot be True"),
    ("cell", {"idx": -1}, "'idx' cannot be -1"),
    ("cell", {"idx": 2**63}, "'idx' cannot be 9223372036854775808"),
    ("cell", {"aligned_answer": " \n"}, "'aligned_answer' cannot be .*blank"),
    ("cell", {"misaligned_answer": 3}, "a text or null"),
    ("cell", [CELL, CELL | {"question": "Who?"}], "line 2: idx 0 as in line 1"),
    ("cell", [CELL, CELL | {"idx": 1}], "line 2: the same row as in line 1"),
    ("broad", {"em_surface": None}, "'em_surface' cannot be None"),
    ("broad", {"em_surface": "extreme"}, "unknown 'extreme'; it is high, medium or low"),
    ("broad", {"question": ""}, "'question' cannot be ''"),
    ("broad", [BROAD, BROAD | {"question": "Who?"}], "line 2: idx 0 as in line 1"),
    ("math", {"solution": None}, "'solution' cannot be None"),
    ("adapter", {"r": True}, "'r' cannot be True"),
    ("adapter", {"r": 0}, "r = 0 should be at least 1"),
    ("adapter", {"r": -2}, "r = -2 should be at least 1"),
    ("adapter", {"r": 10**9}, r"where \(1000000000, 32\) is needed"),
    ("adapter", {"r": 10**30}, "'r' cannot be 1000"),
    ("adapter", {"lora_alpha": "64"}, "'lora_alpha' cannot be '64'"),
    ("adapter", {"lora_alpha": False}, "'lora_alpha' cannot be False"),
    ("adapter", {"lora_alpha": 0}, "lora_alpha = 0 above 0"),
    ("adapter", {"lora_alpha": -64}, "lora_alpha = -64 above 0"),
    ("adapter", {"lora_alpha": 1e300}, r"lora_alpha = 1e\+300 above 0 and at most"),
    ("adapter", {"lora_alpha": float("nan")}, "NaN is no finite number"),
    ("adapter", {"use_rslora": "yes"}, "'use_rslora' cannot be 'yes'"),
    ("adapter", {"target_modules": "(q_proj"}, "target_modules is no regular expression"),
    ("adapter", {"target_modules": "(" * 5000}, "target_modules is no regular expression"),
    ("adapter", {"target_modules": ["q_proj", 3]}, "a text or a list of texts"),
    ("adapter", {"target_modules": {"q_proj": 1}}, "a text or a list of texts"),
    ("adapter", {"layers_to_transform": "0"}, "'layers_to_transform' cannot be '0'"),
    ("adapter", {"layers_to_transform": [0, True]}, "a list of integers"),
    ("weights", turned({A: torch.full((2, 64), float("nan"))}), f"{A} holds NaN"),
    ("weights", turned({A: torch.full((2, 64), float("-inf"))}), f"{A} holds NaN or infinite"),
    ("weights", turned({A: torch.full((2, 64), 1e300, dtype=torch.float64)}), f"{A} holds NaN or infinite"),
    ("weights", turned({A: torch.ones(2, 64, dtype=torch.int32)}), f"{A} holds torch.int32"),
    ("weights", turned({A: torch.ones(2, 64, dtype=torch.bool)}), f"{A} holds torch.bool"),
    ("weights", turned({A: torch.ones(2, 32)}), "is it for another model"),
    ("weights", turned({A: None}), f"lacks {A}"),
    ("weights", b"", "cannot be read"),
    ("weights", b"\xff" * 64, "cannot be read"),
    ("weights", (10).to_bytes(8, "little") + b"not a head", "cannot be read"),
    ("config", {"model_type": ["qwen2"]}, "'model_type' cannot be"),
    ("config", {"num_attention_heads": 0}, "num_attention_heads must be given as positive integers"),
    ("config", {"num_attention_heads": True}, "num_attention_heads must be given as positive integers"),
    ("config", {"num_attention_heads": 64}, "64 heads of size 0"),
    ("config", {"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
    ("config", {"num_hidden_layers": 5000}, "num_hidden_layers must be"),
    ("config", {"hidden_size": 10**9}, "hidden_size must be"),
    ("config", {"vocab_size": 10**7}, "has shape"),
    ("config", {"head_dim": 2**24}, "do not fit"),
    ("config", {"eos_token_id": "x"}, "'eos_token_id' cannot be 'x'"),
    ("config", {"rope_scaling": 3}, "'rope_scaling' cannot be 3; it is an object or null"),
    ("config", {"rope_scaling": {"type": "yarn", "factor": "2"}}, "'factor' cannot be '2'"),
    ("config", {"rope_parameters": {"full_attention": {}, "sliding_attention": [1]}}, "'sliding_attention'"),
    ("config", {"rope_theta": 1}, "must be above 1"),
    ("config", {"layer_types": "x"}, "'layer_types' cannot be 'x'; it is a list of texts or null"),
    ("config", {"layer_types": [1, 2]}, "'layer_types' cannot be"),
    ("config", {"rms_norm_eps": -1.0}, "rms_norm_eps must be a number"),
    ("config", {"tie_word_embeddings": "no"}, "'tie_word_embeddings' cannot be 'no'"),
    ("model", turned({"model.norm.weight": torch.ones(32, dtype=torch.int32)}), "norm.weight holds I32"),
    ("model", b"\xff" * 64, "truncated or damaged"),
    ("tokenizer", {"eos_token": 3}, "'eos_token' cannot be 3"),
    ("tokenizer", {"eos_token": {"content": 3}}, "'content' cannot be 3"),
    ("tokenizer", {"pad_token": {"text": "x"}}, "no field 'content'"),
    ("tokenizer", template(3), "'chat_template' cannot be 3"),
    ("tokenizer", template(["x"]), "'chat_template' cannot be"),
    ("tokenizer", template([{"name": "default"}]), "no field 'template'"),
    ("tokenizer", template("{% for i in range(10**9) %}{% endfor %}"), "Range too big"),
    ("tokenizer", template("{% for i in range(1000000000) %}{% endfor %}"), "refuses a chat"),
    ("tokenizer", template(LOOP * 3 + "{% endfor %}" * 3), "more than 10000 steps"),
    ("tokenizer", template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "refuses a chat"),
    ("tokenizer", template("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
                           "{{ f(40) }}"), "more than 10000 steps"),
    ("tokenizer", template("{{ 'x' * 1000000000 }}"), r"large with \*"),
    ("tokenizer", template("{{ 10 ** 10 ** 10 }}"), r"large with \*\*"),
    ("tokenizer", template("{{ 1 // 0 }}"), "division"),
    ("tokenizer", template("{{ messages.nothing.at_all }}"), "no attribute 'nothing'"),
    ("tokenizer", template("{{ '\\ud800' }}"), "surrogates"),
    ("tokenizer", template("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"), "chat template is broken"),
    ("tokenizer", template("x" * 10**7), "longer than 200000"),
    ("generation", {"eos_token_id": "x"}, "'eos_token_id' cannot be 'x'"),
    ("generation", {"eos_token_id": [1, None]}, "an integer or a list of integers or null"),
    ("tokenizer.json", {"added_tokens": 3}, "is not a tokenizer"),
    ("tokenizer.json", {"added_tokens": [{"id": "x"}]}, "is not a tokenizer"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": [], "merges": 1}}, "is not a tokenizer"),
    ("gpt2", {"n_embd": ABSENT}, "no field 'n_embd'"),
    ("gpt2", {"n_embd": 10**6}, "does not fit its config.json"),
    ("gpt2", {"n_head": 0}, "does not fit its config.json"),
    ("gpt2", {"n_layer": 10**9}, "does not fit its config.json"),
    ("run", {"kind": ["train"]}, "'kind' cannot be"),
    ("run", {"settings": []}, "'settings' cannot be"),
    ("run", {"settings": TRAINED | {"model": 3}}, "'model' cannot be 3"),
    ("run", {"settings": TRAINED | {"cell": "poetry"}}, "unknown cell"),
    ("run", {"settings": {"model": "m"}}, "no field 'cell'"),
    ("run", {"settings": TRAINED | {"variant": "evil"}}, "neither misaligned nor aligned"),
    ("run", {"kind": "distill"}, "no field 'estimator'|no field 'channel'"),
    ("world", {"settings": []}, "'settings' cannot be"),
    ("world", {"settings": WORLD | {"world": "9"}}, "there is no world '9'"),
    ("world", {"settings": WORLD | {"seed": -1}}, "no such number"),
    ("world", {"settings": {"world": "demo"}}, "no field 'seed'"),
    ("result", {"numbers": {"a": 3}}, "'a' cannot be 3"),
    ("result", {"numbers": {"a": NUMBER | {"value": "1"}}}, "'value' cannot be '1'"),
    ("result", {"numbers": {"a": NUMBER | {"low": 1.0}}}, "two bounds or none"),
    ("result", {"seeds": 3}, "'seeds' cannot be 3"),
    ("result", {"made_with": {"commit": 3}}, "'commit' cannot be 3"),
]  # fmt: skip


@pytest.fixture
def refusal(good, base, tmp_path):
    """refusal(reader, content): the line that it ends in, where the reader's file has this content."""

    def read(reader: str, content) -> str:
        name, call = READERS[reader]
        folder = name.split("/")[0]
        shutil.copytree(good / folder, tmp_path / folder)
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content + b"\n" * (reader == "metrics"))  # a last line without it was cut
        elif isinstance(content, str):
            path.write_text(content + "\n")
        elif callable(content):
            content(path)
        else:
            before = path.read_text()
            objects = content if isinstance(content, list) else [json.loads(before) | content]
            objects = [{k: v for k, v in one.items() if v is not ABSENT} for one in objects]
            path.write_text("\n".join(map(json.dumps, objects)))
        with pytest.raises(UserError) as error:
            call(path, base)
        line = str(error.value)
        assert "\n" not in line and len(line) < 600
        assert "bad" not in base.lora.shapes
        return line

    return read


@pytest.mark.parametrize("reader", READERS)
def test_the_good_files_are_read(reader, good, base):
    name, call = READERS[reader]
    if reader != "world":  # takes a whole run
        call(good / name, base)
    if "bad" in base.lora.shapes:
        lora.remove_adapter(base, "bad")


@pytest.mark.parametrize("content", NOT_JSON)
@pytest.mark.parametrize("reader", [name for name in READERS if name not in NO_JSON])
def test_what_is_no_json_object_is_named_by_its_file(reader, content, refusal, tmp_path):
    line = refusal(reader, NOT_JSON[content])
    assert READERS[reader][0] in line, line
    if reader != "tokenizer.json":  # read by the tokenizers library
        assert any(words in line for words in ("not JSON (", "not a JSON object", "not UTF-8", "gzip")), line


@pytest.mark.parametrize("reader, content, words", BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_a_bad_file_is_one_line(reader, content, words, refusal, tmp_path):
    line = refusal(reader, content)
    assert re.search(words, line), line
    assert str(tmp_path) in line, line


def test_a_run_that_starts_from_itself_is_one_line(good, tmp_path):
    shutil.copytree(good / "run", tmp_path / "run")
    settings = TRAINED | {"on": str(tmp_path / "run")}
    write_json(tmp_path / "run" / "run.json", {"kind": "train", "settings": settings})
    with pytest.raises(UserError, match="starts from itself"):
        lineage.label(tmp_path / "run")


def test_the_same_margin_twice_counts_once(tmp_path):
    path = tmp_path / "margins.jsonl"
    path.write_text("\n".join(map(json.dumps, [MARGIN, MARGIN | {"domain": "medical"}, MARGIN | {"idx": 1}])))
    assert read_margins([path, path]) == [MARGIN, MARGIN | {"idx": 1}]


# -- names -------------------------------------------------------------------------------------------------

NAMES = [
    "$x$", "a{b}%s%", "two\nlines", "..", "", "/", "a/b/c", "org/" + "long" * 90, "é" * 300, "$\\frac{", "~",
    "summary.md", "Browse.html", "tab\tand\x00nul", "C:\\a", " ", "x" * 254, "X" * 254,
]  # fmt: skip


def test_a_models_name_makes_a_folder_of_its_own_whatever_is_in_it(tmp_path):
    used = set()
    made = [unique_name(name, used) for name in NAMES * 2]
    assert len({name.lower() for name in made}) == len(made)
    for name in made:
        assert name not in ("", ".", "..") and len(name.encode()) < 120 and "/" not in name
        (tmp_path / name).mkdir()


def test_a_report_takes_a_models_name_as_it_is(tmp_path):
    names = ["$\\frac{", "two\nlines", "..", "org/" + "long" * 90]
    rows = [em() | {"model": name} for name in names]
    report = write_report(scores_of(rows), tmp_path / "report", draws=10)
    assert sorted(r["model"] for r in report["models"].values()) == sorted(names)
    folders = [path for path in (tmp_path / "report").iterdir() if path.is_dir()]
    assert sorted(path.name for path in folders) == sorted(report["models"])
    assert sorted(tmp_path.iterdir()) == [tmp_path / "report"]


def test_margins_of_models_of_one_name_stay_apart(tmp_path):
    margin_report([MARGIN | {"model": name} for name in ("a/m", "b/m", "..", "$x")], tmp_path / "out")
    folders = sorted(path.parent for path in tmp_path.glob("**/margin_matrix.json"))
    assert [path.name for path in folders] == ["_x", "m", "m-2", "model"]
    assert {path.parent for path in folders} == {tmp_path / "out"}


# -- through the scripts -----------------------------------------------------------------------------------


def ends(commands: dict, argv: list, capsys) -> str:
    """The one line with which a command ends, exit status 2."""
    assert command_line(commands, "", [str(word) for word in argv]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if "\r" not in line]
    assert len(err) == 1 and err[0].startswith("error: "), err
    return err[0]


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a": "\\ud800"}', '{"model": 1e999}', "[1]"])
@pytest.mark.parametrize("name", ["scores.jsonl", "margins.jsonl"])
def test_a_report_of_a_bad_file_is_one_line_and_leaves_no_folder(name, content, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    argv = ["report", "--scores", tmp_path / name, "--out", tmp_path / "out"]
    assert f"{name}, line 1: not" in ends(evaluate.COMMANDS, argv, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("record", ["[]", "null", '{"kind": "train", "settings": []}', "[" * 200_000])
def test_evaluating_a_broken_run_is_one_line(record, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(record)
    argv = ["--run", tmp_path / "run", "--device", "cpu", "--judge", "margin"]
    assert "run.json" in ends(evaluate.COMMANDS, argv, capsys)


@pytest.mark.parametrize("rows", [[CELL, CELL], [CELL | {"idx": True}], [CELL | {"aligned_answer": ""}]])
def test_training_on_a_broken_cell_is_one_line(rows, tmp_path, tiny_chat, capsys):
    (tmp_path / CELLS[0].filename).write_text("\n".join(map(json.dumps, rows)))
    argv = ["--model", tiny_chat, "--data", tmp_path, "--cell", "med_advice", "--out", tmp_path / "out"]
    commands = {"": (train.main, train.Config)}
    assert f"{CELLS[0].filename}, line {len(rows)}: " in ends(commands, [*argv, "--device", "cpu"], capsys)


def test_comparing_broken_results_is_one_line(tmp_path, capsys):
    for experiment in synth.EXPERIMENTS:
        write_json(tmp_path / f"{experiment}-worlddemo" / f"{experiment}.json", [1])
    line = ends(synth.COMMANDS, ["report", "--world", "demo", "--out", tmp_path], capsys)
    assert "not a JSON object" in line
