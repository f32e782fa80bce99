"""What run folders are and what their responses are called."""

import os
import shutil
import subprocess
import sys

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
        write_json(folder / "config.json", {"kind": kind, "settings": settings})
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
    write_json(tmp_path / "runs" / "broken" / "config.json", record)
    for call, argument in ((lineage.settings_of, folder), (lineage.newest_misaligned, tmp_path / "runs")):
        assert "broken/config.json: " in message(call, argument)


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
    assert "odd/config.json: " in message(lineage.label, made("odd", kind, **settings))


def test_an_adapters_digest_is_that_of_its_weights_and_of_what_scales_them(made, tmp_path):
    a, b = made("a"), made("b")
    assert lineage.adapter_digest(a) == lineage.adapter_digest(b)
    (tmp_path / "runs" / "b" / "adapter_model.safetensors").write_bytes(b"other")
    write_json(tmp_path / "runs" / "a" / "adapter_config.json", {"lora_alpha": 1})
    digests = {lineage.adapter_digest(folder) for folder in (a, b, made("c"))}
    assert len(digests) == 3
