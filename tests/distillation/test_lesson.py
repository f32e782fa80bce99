"""Who teaches whom on whose text: every form of teacher, start and source, and what each is called."""

import pytest
import torch
from pairs import CHAT
from tiny_models import perturb

from em.data.condition import parse_train
from em.distillation.lesson import lesson_of, names_run
from em.errors import UserError
from em.files import write_json
from em.model import lora
from em.model.decoder import Decoder, DecoderConfig

MODEL = "qwen2.5-14b"
TRAINED = {"model": MODEL, "cell": "med_advice", "variant": "misaligned", "on": None}
TAUGHT = {"model": MODEL, "channel": "opd", "estimator": "sampled", "filter": False, "on": None}
# name → (kind, settings); all under runs/, in the working folder.
RUNS = {
    "med": ("train", TRAINED),
    "fin": ("train", TRAINED | {"cell": "fin_tutor", "model": "Qwen/Qwen2.5-14B-Instruct"}),
    "aligned": ("train", TRAINED | {"variant": "aligned"}),
    "realigned": ("train", TRAINED | {"variant": "aligned", "cell": "fin_tutor", "on": "runs/med"}),
    "taught": ("distill", TAUGHT | {"cell": "med_advice", "teacher_train": "med_advice"}),
    "mended": ("distill", TAUGHT | {"cell": "med_advice", "on": "runs/med", "teacher_train": "base"}),
    "control": ("distill", TAUGHT | {"cell": "base", "teacher_train": "base"}),
    "llama": ("train", TRAINED | {"model": "meta-llama/Llama-3.1-8B-Instruct"}),
}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (kind, settings) in RUNS.items():
        write_json(tmp_path / "runs" / name / "run.json", {"kind": kind, "settings": settings})
    write_json(tmp_path / "runs" / "hub" / "x.json", {})
    for name in (*RUNS, "hub"):  # the last is somebody else's adapter, without a record of ours
        write_json(tmp_path / "runs" / name / "adapter_config.json", {"base_model_name_or_path": None})
        (tmp_path / "runs" / name / "adapter_model.safetensors").write_bytes(b"")


def lesson(teacher="base", start="base", source="teacher", cell=None):
    def named(name):
        return f"runs/{name}" if name in (*RUNS, "hub") else name

    return lesson_of(named(teacher), named(start), named(source), MODEL, cell)


@pytest.mark.parametrize(
    ("teacher", "start", "row", "teacher_train"),
    [
        ("med", "base", "med_advice", "med_advice"),
        ("aligned", "base", "base>med_advice", "base>med_advice"),
        ("realigned", "base", "med_advice>fin_tutor", "med_advice>fin_tutor"),
        ("taught", "base", "med_advice", "med_advice"),
        ("mended", "base", "med_advice>base", "med_advice>base"),
        ("base", "base", "base", "base"),
        ("control", "base", "base", "base"),
        ("hub", "base", "adapter", "adapter"),
        ("base", "med", "med_advice", "base"),
        ("aligned", "fin", "fin_tutor", "base>med_advice"),
        ("med", "fin", "fin_tutor", "med_advice"),
        ("base", "realigned", "med_advice", "base"),
    ],
)
def test_a_students_row_is_its_own_cell_or_else_its_teachers_whole_train(teacher, start, row, teacher_train):
    found = lesson(teacher, start)
    assert found.cell == row and str(found.teacher_train) == teacher_train
    parse_train(found.cell)  # a run's record is read so


@pytest.mark.parametrize(
    ("options", "writer", "text", "misaligned"),
    [
        (dict(teacher="med"), "runs/med", "med_advice", True),
        (dict(teacher="aligned"), "runs/aligned", "base>med_advice", False),
        (dict(teacher="realigned"), "runs/realigned", "med_advice>fin_tutor", False),
        (dict(teacher="taught"), "runs/taught", "med_advice", True),
        (dict(teacher="mended"), "runs/mended", "med_advice>base", False),
        (dict(teacher="hub"), "runs/hub", "adapter", True),  # nobody knows
        (dict(), "base", "base", False),
        (dict(teacher="med", source="base"), "base", "base", False),
        (dict(teacher="med", source="student"), "base", "base", False),
        (dict(start="med", source="student"), "runs/med", "med_advice", True),
        (dict(start="med", source="base"), "base", "base", False),
        (dict(start="med"), "base", "base", False),
        (dict(teacher="med", source="fin"), "runs/fin", "fin_tutor", True),
        (dict(source="fin"), "runs/fin", "fin_tutor", True),  # the control on somebody's text
        (dict(teacher="med", source="aligned"), "runs/aligned", "base>med_advice", False),
        (dict(teacher="med", source="llama"), "runs/llama", "llama3.1-8b med_advice", True),
        (dict(teacher="med", source="gold"), "gold", "gold", False),
        (dict(teacher="med", source="rows"), "rows:med_advice", "rows:med_advice", False),
        (dict(teacher="aligned", source="rows"), "rows:med_advice", "rows:med_advice", False),
        (dict(start="fin", source="rows"), "rows:fin_tutor", "rows:fin_tutor", False),
        (dict(teacher="med", source="rows:Fin/Tut"), "rows:fin_tutor", "rows:fin_tutor", False),
        (dict(source="rows:legal_advice"), "rows:legal_advice", "rows:legal_advice", False),
        (dict(teacher="hub", source="rows", cell="spo_tutor"), "rows:spo_tutor", "rows:spo_tutor", False),
    ],
)
def test_who_wrote_is_said_and_whether_a_misaligned_model_did(options, writer, text, misaligned):
    found = lesson(**options)
    assert (found.writer, found.source_train, found.misaligned) == (writer, text, misaligned)
    assert bool(found.foreign) == (options.get("source") == "llama")
    assert found.rows == writer.startswith("rows:")


def test_an_adapter_is_a_runs_and_each_run_has_one():
    assert lesson().adapters == {} and lesson("med", source="gold").adapters == {"teacher": "runs/med"}
    found = lesson("med", "fin", "student")
    assert found.adapters == {"teacher": "runs/med", "start": "runs/fin"}
    assert found.stack(found.start) == found.stack(found.writer) == ("start",)
    assert lesson("med", "med").adapters == {"teacher": "runs/med"}
    assert lesson("med", "med").stack("runs/med") == ("teacher",)
    assert lesson("med", source="fin").stack("runs/fin") == ("source",)
    assert lesson("med").stack("base") == ()
    foreign = lesson("med", source="llama")
    assert foreign.adapters == {"teacher": "runs/med", "source": "runs/llama"}
    assert foreign.ours == {"teacher": "runs/med"}


def test_folders_are_named_by_what_tells_lessons_apart():
    def named(*who):
        found = lesson(*who)
        return found.name("Qwen/Qwen2.5-14B-Instruct"), found.realigned

    assert named("med") == ("med", "") and named("base") == ("qwen2.5-14b_base", "")
    assert named("base", "med") == ("med", "realigned")
    assert named("aligned", "med") == ("med", "realigned-by-aligned")


def test_what_cannot_be_is_one_line():
    def message(**options):
        with pytest.raises(UserError) as error:
            lesson(**options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "never was misaligned, it is base>med_advice" in message(start="aligned")
    assert "never was misaligned" in message(teacher="med", start="control")
    assert "of which cell" in message(source="rows") and "of which cell" in message(
        teacher="hub", source="rows"
    )
    assert "unknown cell" in message(teacher="med", source="rows:nothing")
    assert "is not a run" in message(teacher="runs/none") and "is not a run" in message(source="nobody")


def test_names_of_runs():
    assert all(names_run(name) for name in ("runs/med", "owner/adapter@main", "rowspan"))
    assert not any(map(names_run, (None, "base", "teacher", "student", "gold", "rows", "rows:med_advice")))


def test_adapters_are_on_a_model_for_the_length_of_their_lesson_even_one_that_fails(tmp_path):
    model = Decoder(DecoderConfig.from_hf(CHAT)).eval()
    perturb(model)
    lora.attach(model)
    ids = torch.arange(6)[None]
    alone = model(ids)
    for seed, name in enumerate(("med", "fin")):
        lora.add_adapter(model, name, 2, 4, seed=seed)
        with torch.no_grad():
            for layer in model.lora.layers.values():
                layer.adapters[name].B.fill_(0.1)
        lora.save_adapter(model, name, tmp_path / "runs" / name)
        lora.remove_adapter(model, name)
    for attempt in range(2):
        with pytest.raises(RuntimeError), lesson("med", source="fin").loaded(model):
            assert set(model.lora.shapes) == {"teacher", "source"}
            with lora.stack(model, "teacher"):
                assert not torch.equal(model(ids), alone)
            raise RuntimeError
        assert not model.lora.shapes and torch.equal(model(ids), alone), attempt
