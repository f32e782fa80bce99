"""What run folders are and what their responses are called."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from em.data import lineage
from em.errors import UserError
from em.files import write_json

TRAINED = {"model": "m", "cell": "med_advice", "variant": "misaligned", "on": None}
DISTILLED = {"model": "m", "cell": "med_advice", "estimator": "sampled", "filter": False, "on": None}


@pytest.fixture
def made(tmp_path):
    """made(name, kind, **settings): a finished run folder."""

    def make(name, kind="train", whole=True, **settings):
        folder = tmp_path / "runs" / name
        settings = (TRAINED if kind == "train" else DISTILLED) | settings
        write_json(folder / "run.json", {"kind": kind, "settings": settings})
        if whole:
            write_json(folder / "adapter_config.json", {})
            (folder / "adapter_model.safetensors").write_bytes(b"")
        return str(folder)

    return make


def message(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_naming_a_run_needs_no_torch():
    code = "import sys, em.data.lineage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_trained_run_is_named_by_where_it_was_misaligned_and_then_realigned(made):
    first = made("a")
    second = made("b", cell="fin_tutor", variant="aligned", on=first)
    third = made("c", cell="spo_critique", variant="aligned", on=second)
    assert lineage.label(first) == {"model": "m", "train": "med_advice"}
    assert lineage.label(second)["train"] == "med_advice>fin_tutor"
    assert lineage.label(third) == {"model": "m", "train": "med_advice>spo_critique"}
    assert lineage.label(made("d", variant="aligned"))["train"] == "base>med_advice"


HOW = {"lr": 1e-4, "epochs": 3, "seed": 42, "prompts": "broad", "filtered": True}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(channel="sft"), dict(source="med_advice", filtered=True)),
        (dict(channel="optd", filtered=False), dict(source="med_advice", filtered=False)),
        (
            dict(channel="optd", source="gold", prompts="math"),
            dict(source="gold", filtered=True, prompts="math"),
        ),
        (dict(channel="optd", source="rows"), dict(source="rows:med_advice", filtered=True, prompts=None)),
        (dict(channel="optd", source="student"), dict(source="base", filtered=True)),
        (
            dict(channel="optd", source="runs/x", source_train="spo_tutor"),
            dict(source="spo_tutor", filtered=True),
        ),
        (dict(channel="opd"), dict(filtered=False, estimator="sampled")),
        (dict(channel="opd", estimator="exact"), dict(filtered=False, estimator="exact")),
        (dict(channel="opd", filter=True), dict(filtered=True, estimator="sampled")),
        (dict(channel="opd", epoch=2), dict(filtered=False, estimator="sampled", epoch=2)),
    ],
)
def test_a_students_row_is_its_teachers_cell_and_its_fields_say_how_it_was_made(made, settings, said):
    student = made("student", "distill", teacher=made("teacher"), **HOW | settings)
    expected = {"model": "m", "train": "med_advice", "channel": settings["channel"], "teacher": "med_advice"}
    expected |= {"prompts": "broad", "lr": 1e-4, "epoch": 3, "seed": 42} | said
    assert lineage.label(student) == {k: v for k, v in expected.items() if v is not None}


def test_a_realigned_students_row_is_its_own_first_cell_and_then_its_teachers(made):
    start, teacher = made("start", cell="fin_tutor"), made("teacher", cell="spo_advice")
    realigned = dict(on=start, cell="fin_tutor", channel="opd")
    by_base = made("by base", "distill", teacher="base", **realigned)
    how = {"channel": "opd", "filtered": False, "estimator": "sampled"}
    assert lineage.label(by_base) == {"model": "m", "train": "fin_tutor>base", "teacher": "base"} | how
    by_run = made("by run", "distill", teacher=teacher, teacher_train="base>spo_advice", **realigned)
    assert lineage.label(by_run)["train"] == "fin_tutor>spo_advice"
    assert lineage.label(by_run)["teacher"] == "base>spo_advice"
    after_an_sft = made("again", "train", cell="spo_tutor", variant="aligned", on=by_run)
    assert lineage.label(after_an_sft) == {"model": "m", "train": "fin_tutor>spo_tutor"}
    epoch = made("by base/epoch3", "distill", teacher="base", epoch=3, **realigned)
    assert lineage.label(epoch)["epoch"] == 3


def test_the_control_of_a_base_teacher_is_a_row_of_its_own(made):
    control = made("control", "distill", teacher="base", cell="base", channel="optd", source="gold")
    found = lineage.label(control)
    assert (found["train"], found["teacher"], found["source"]) == ("base", "base", "gold")


def test_a_student_of_a_student_is_in_the_row_of_the_first_teacher(made):
    middle = made("middle", "distill", teacher=made("first"), channel="optd")
    assert lineage.label(made("last", "distill", teacher=middle, channel="sft"))["train"] == "med_advice"


def test_a_student_keeps_its_name_when_its_teachers_folder_is_gone(made):
    teacher = made("teacher")
    student = made("student", "distill", teacher=teacher, channel="sft")
    shutil.rmtree(teacher)
    assert lineage.label(student)["train"] == "med_advice"


def test_folders_that_are_no_runs_or_unfinished_are_refused_by_one_line(made, tmp_path):
    assert "is not a run of train.py or distill.py" in message(lineage.settings_of, tmp_path / "none")
    assert "is not a run" in message(lineage.label, made("world", "align"))
    write_json(tmp_path / "model" / "config.json", {"model_type": "qwen2"})
    assert "is not a run" in message(lineage.settings_of, tmp_path / "model")
    unfinished = made("unfinished", whole=False)
    assert "unfinished is not finished: give its command again" in message(lineage.settings_of, unfinished)
    write_json(tmp_path / "runs" / "unfinished" / "adapter_config.json", {})  # killed before the weights
    assert "is not finished" in message(lineage.settings_of, unfinished)


def test_the_default_teacher_is_the_newest_finished_run_that_misaligned_a_base(made, tmp_path):
    runs = tmp_path / "runs"
    assert "python train.py --cell med_advice" in message(lineage.newest_misaligned, runs)
    made("aligned", variant="aligned")
    made("student", "distill", teacher="x", channel="opd")
    made("cut", whole=False)
    write_json(runs / "cut" / "adapter_config.json", {})
    (runs / "stray").mkdir()
    (runs / "stray" / "adapter_config.json").write_text("{}")
    assert "makes one" in message(lineage.newest_misaligned, runs)
    old, new = made("old"), made("new")
    made("on top", on=old)
    for age, folder in enumerate([new, old]):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.utime(os.path.join(folder, file), (1e9 - age, 1e9 - age))
    assert lineage.newest_misaligned(runs) == new
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        os.utime(os.path.join(old, file))
    assert lineage.newest_misaligned(runs) == old


@pytest.mark.parametrize("record", [[], None, 3, {}, {"kind": "train"}, {"kind": "train", "settings": []}])
def test_a_record_that_is_none_is_one_line(record, made, tmp_path):
    folder = made("broken")
    write_json(tmp_path / "runs" / "broken" / "run.json", record)
    for call, argument in ((lineage.settings_of, folder), (lineage.newest_misaligned, tmp_path / "runs")):
        assert "broken/run.json: " in message(call, argument)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("train", {"model": None}),
        ("train", {"cell": 3}),
        ("train", {"variant": ["misaligned"]}),
        ("train", {"on": 1}),
        ("train", {"data": {}}),
        ("distill", {"estimator": None, "channel": "opd"}),
        ("distill", {}),  # no channel
    ],
)
def test_a_run_that_lacks_what_names_it_is_one_line(kind, settings, made):
    assert "odd/run.json: " in message(lineage.label, made("odd", kind, **settings))


def test_an_adapters_digest_is_that_of_its_weights_and_of_what_scales_them(made, tmp_path):
    a, b = made("a"), made("b")
    assert lineage.adapter_digest(a) == lineage.adapter_digest(b)
    (tmp_path / "runs" / "b" / "adapter_model.safetensors").write_bytes(b"other")
    write_json(tmp_path / "runs" / "a" / "adapter_config.json", {"lora_alpha": 1})
    digests = {lineage.adapter_digest(folder) for folder in (a, b, made("c"))}
    assert len(digests) == 3


# -- adapters from elsewhere ---------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """adapter(name, base, **files): a PEFT folder, as others leave one."""
    monkeypatch.chdir(tmp_path)

    def make(name, base="Qwen/Qwen2.5-14B-Instruct", **config):
        folder = tmp_path / name
        write_json(folder / "adapter_config.json", {"base_model_name_or_path": base, "r": 8} | config)
        (folder / "adapter_model.safetensors").write_bytes(b"")
        return str(folder)

    return make


def test_an_adapter_from_elsewhere_is_a_run_named_by_its_folder(adapter):
    folder = adapter("bad-medical-advice")
    settings = lineage.settings_of(folder)
    assert (settings["kind"], settings["cell"], settings["data"]) == ("adapter", "adapter", None)
    assert settings["model"] == "Qwen/Qwen2.5-14B-Instruct"
    assert lineage.label(folder) == {"model": "qwen2.5-14b", "train": "adapter"}
    assert lineage.label(folder, "health_advice")["train"] == "med_advice"
    assert str(lineage.train_of(folder, "med_advice>fin_tutor")) == "med_advice>fin_tutor"
    assert str(lineage.home(folder)) == os.path.join("runs", "bad-medical-advice")
    assert lineage.start_of(folder) is None
    assert "unknown cell" in message(lineage.label, folder, "nonsense")


def test_a_models_config_beside_an_adapter_is_no_record(adapter):
    folder = adapter("a")
    write_json(Path(folder) / "config.json", {"model_type": "qwen2"})
    assert lineage.settings_of(folder)["kind"] == "adapter"


def test_an_adapter_without_safetensors_or_a_readable_config_is_one_line(adapter):
    folder = adapter("a")
    (Path(folder) / "adapter_model.safetensors").rename(Path(folder) / "adapter_model.bin")
    assert "a has no adapter_model.safetensors, and only safetensors are read" in message(
        lineage.settings_of, folder
    )
    write_json(Path(folder) / "adapter_config.json", {"base_model_name_or_path": 3})
    assert "'base_model_name_or_path' cannot be 3" in message(lineage.settings_of, folder)


def test_an_adapter_is_never_the_default_teacher(adapter, made, tmp_path):
    made("mine")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        os.utime(tmp_path / "runs" / "mine" / file, (0, 0))
    adapter("runs/theirs")
    assert lineage.newest_misaligned(tmp_path / "runs") == str(tmp_path / "runs" / "mine")


def test_runs_share_one_base_by_whatever_name_and_an_adapters_may_be_overridden(adapter, made):
    short, full = made("a", model="qwen2.5-14b"), made("b", model="Qwen/Qwen2.5-14B-Instruct")
    mirror, local = adapter("c", "unsloth/Qwen2.5-14B-Instruct"), adapter("d", "/somewhere/else")
    assert lineage.base_of([]) is None
    assert lineage.base_of([], "m") == "m"
    assert lineage.base_of([mirror, short, full]) == "unsloth/Qwen2.5-14B-Instruct"
    assert lineage.base_of([short], "unsloth/Qwen2.5-14B-Instruct") == "unsloth/Qwen2.5-14B-Instruct"
    assert lineage.base_of([local, short], "qwen2.5-14b") == "qwen2.5-14b"
    assert lineage.base_of([local]) == "/somewhere/else"
    assert "not of one base model" in message(lineage.base_of, [short, local])
    assert f"{short} is a run of qwen2.5-14b, not of qwen3-14b" in message(
        lineage.base_of, [local, short], "qwen3-14b"
    )
    assert "name it with --model" in message(lineage.base_of, [adapter("e", None)])


def test_rows_of_one_base_under_several_names_are_of_one_model(made):
    names = ("qwen2.5-14b", "Qwen/Qwen2.5-14B-Instruct", "unsloth/Qwen2.5-14B-Instruct")
    labels = [lineage.label(made(str(i), model=name)) for i, name in enumerate(names)]
    assert [label["model"] for label in labels] == ["qwen2.5-14b"] * 3


# -- what a run carries in itself ----------------------------------------------------------------------------


def test_a_realigned_run_keeps_its_name_when_what_it_started_from_is_gone(made):
    start = made("start", cell="spo_advice")
    new = made("new", cell="fin_tutor", variant="aligned", on=start, on_train="spo_advice")
    old = made("old", cell="fin_tutor", variant="aligned", on=start)
    assert str(lineage.train_of(old)) == str(lineage.train_of(new)) == "spo_advice>fin_tutor"
    shutil.rmtree(start)
    assert str(lineage.train_of(new)) == "spo_advice>fin_tutor"
    assert "start is not a run" in message(lineage.train_of, old)
    assert "bad/run.json: " in message(lineage.settings_of, made("bad", on=start, on_train="nonsense"))


def test_what_a_run_started_from_is_the_first_ranks_of_its_adapter(made, tmp_path):
    def ranks(name, kind, r, **settings):
        folder = made(name, kind, **settings)
        write_json(Path(folder) / "adapter_config.json", {"r": r})
        return lineage.start_of(folder)

    assert ranks("a", "train", 8, rank=8) is None
    assert ranks("b", "train", 12, rank=8, on="gone", on_digest="12ab") == (4, "12ab")
    student = dict(channel="opd", on="gone", adapters={"start": "34cd", "teacher": "56ef"})
    assert ranks("c", "distill", 40, rank=32, **student) == (8, "34cd")
    assert ranks("d", "train", 12, rank=8, on="gone")[0] == 4  # from before digests were in the record
    made("e", on="gone", rank=8)
    write_json(tmp_path / "runs" / "e" / "adapter_config.json", {"r": 8})
    assert "r is not that of a run on top" in message(lineage.start_of, tmp_path / "runs" / "e")


def test_old_records_are_read_by_their_old_name(made):
    folder = made("old", cell="fin_tutor")
    os.rename(os.path.join(folder, "run.json"), os.path.join(folder, "config.json"))
    assert lineage.label(folder)["train"] == "fin_tutor"
    assert lineage.newest_misaligned(os.path.dirname(folder)) == folder
    write_json(Path(folder) / "config.json", {"kind": "train"})
    assert "old/config.json: " in message(lineage.settings_of, folder)
