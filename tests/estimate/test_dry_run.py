"""The scripts' --dry-run: no weights, no network, no GPU, nothing written."""

import socket

import pytest

import distill
import evaluate
import synth
import train
from em.cli import command_line
from em.estimate import chat, runs
from em.estimate.gpus import GPUS
from em.estimate.shapes import config_of, with_layers
from em.estimate.sheet import Plan
from em.files import write_json
from em.model import lora
from em.model.hub import MODELS
from em.model.tokenizer import Example
from em.training.memory import MEMORY_SHARE, tokens_that_fit

SCRIPTS = {"train": train, "distill": distill, "evaluate": evaluate, "synth": synth}


@pytest.fixture
def dry(monkeypatch, tmp_path, capsys):
    """dry(line): a script's command line with --dry-run, in an empty folder; gives (status, out, err)."""
    monkeypatch.chdir(tmp_path)

    def no_network(*arguments, **named):
        raise AssertionError("a dry run asks no network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)

    def run(line: str):
        script, *words = line.split()
        status = command_line(SCRIPTS[script].COMMANDS, "", [*words, "--dry-run"])
        assert not [path for path in tmp_path.iterdir() if path.name != "shape"], "it wrote something"
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


@pytest.fixture
def one_layer(monkeypatch):
    """A layer is enough to see that a sheet is printed."""
    monkeypatch.setattr(runs, "config_of", lambda name: with_layers(config_of(name), 1))


@pytest.mark.parametrize("line", [
    "train --cell fin_tutor --model {}", "distill --channel sft --limit 16 --model {}",
    "evaluate --on broad --limit 16 --model {}",
    "evaluate --judge margin --model {}",
])  # fmt: skip
@pytest.mark.parametrize("model", [name for name in MODELS if name != "qwen2.5-14b"])
def test_every_script_prints_a_sheet_for_every_named_model(line, model, dry, one_layer):
    status, out, err = dry(line.format(model))
    assert status == 0 and not err
    assert "an estimate, nothing was run" in out and model in out and "fits, " in out
    assert "step" in out or "pack" in out or "decode" in out


def test_a_world_has_its_sheet(dry):
    status, out, _ = dry("synth --world 1")
    assert status == 0 and "pretrain, a step" in out and "ask: decode" in out


def test_doses_of_a_world_cost_their_steps_and_their_answers(dry, monkeypatch):
    plans = []
    monkeypatch.setattr("em.estimate.sheet.lines", lambda plan: plans.append(plan) or [])
    for doses in ("", " --doses 4", " --doses 4,32"):
        dry(f"synth --world demo --misalign T5,T0 --misalign-steps 8 --misalign-seeds 3{doses}")
    without, one, two = ({part.name: part.times for part in plan.parts} for plan in plans)
    along, asked = "along the doses, a step", "ask: decode, a token a row"
    assert along not in without and one[along] == 6 * 8 and two[along] == 6 * 32
    assert without[asked] < one[asked] < two[asked]
    # The own number of steps is a dose too, so that is two doses and three.
    assert (two[asked] - without[asked]) / (one[asked] - without[asked]) == pytest.approx(3 / 2)


# Bytes at the peak of a 14B on one H100, with the scripts' own settings.
@pytest.mark.parametrize("line, gigabytes", [
    ("train --cell all", 70),
    ("distill --channel opd --prompts broad", 75),
    ("distill --channel opd --prompts math", 75),
])  # fmt: skip
def test_a_14b_fits_an_h100_at_defaults(line, gigabytes, dry, monkeypatch):
    plans = []
    monkeypatch.setattr("em.estimate.sheet.lines", lambda plan: plans.append(plan) or [])
    status, _, err = dry(f"{line} --model qwen2.5-14b")
    assert status == 0 and not err
    (plan,) = plans
    assert isinstance(plan, Plan) and 30e9 < plan.peak < gigabytes * 1e9
    assert 0 < plan.seconds("lower") < plan.seconds("likely")
    for part in plan.parts:
        assert part.lower <= part.likely * (1 + 1e-9)


def test_a_card_that_is_too_small_names_the_knob_that_helps(dry):
    status, out, _ = dry("evaluate --on narrow --limit 20 --model llama3.1-8b --gpu rtx4090")
    assert status == 0 and "does NOT fit" in out and "--rows 32: " in out
    status, out, _ = dry("train --model qwen2.5-14b --gpu rtx4090")
    assert status == 0 and "its weights alone are too large" in out


def test_a_folder_with_nothing_but_config_json_is_enough(dry, one_layer, tmp_path):
    shape = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 2048,
    }  # fmt: skip
    write_json(tmp_path / "shape" / "config.json", shape)
    for line in ("train", "distill --channel opd --limit 16", "evaluate --on narrow --limit 4"):
        status, out, err = dry(f"{line} --model {tmp_path / 'shape'}")
        assert status == 0 and not err and "fits, " in out


@pytest.mark.parametrize("line, words", [
    ("train --gpu tpu", "invalid choice: 'tpu'"),
    ("train --model nobody", "no model 'nobody'"),
    ("train --model nobody/nothing", "not at hand and a dry run asks no network"),
    ("evaluate --model {folder}", "has no config.json"),
    ("distill --channel sft --estimator exact --model qwen2.5-14b", "belong to --channel opd"),
    ("distill --world demo", "synth.py --dry-run"),
    ("train --cell med_nothing", "unknown cell"),
    ("train --data /no/such/data", "neither a folder here nor a hub id"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(line, words, dry, tmp_path):
    (tmp_path / "shape").mkdir()
    status, out, err = dry(line.format(folder=tmp_path / "shape"))
    assert status == 2 and not out and words in err and len(err.splitlines()) == 1


def test_a_teacher_is_counted_without_there_being_one(dry, one_layer, monkeypatch):
    plans = []
    monkeypatch.setattr("em.estimate.sheet.lines", lambda plan: plans.append(plan) or [])
    assert dry("distill --channel opd --limit 16 --model qwen3-14b")[0] == 0
    d, inner, heads = 5120, 17408, (5120, 1024)  # of its layer: q, k, v, o, gate, up and down at rank 32
    one = 32 * (2 * (d + heads[0]) + 2 * (d + heads[1]) + 3 * (d + inner))
    assert plans[0].memory["adapters"] > 2 * 4 * one + 2 * 2 * one  # in fp32, and rounded for sampling


@pytest.mark.parametrize("gpu", ["h100", "l40s"])
def test_the_tokens_said_to_fit_do_fit_and_leave_little_room(gpu):
    card, model = GPUS[gpu], config_of("qwen2.5-14b")
    micro = tokens_that_fit(card.memory, model, 32)
    examples = [Example(range(129), 64)] * (micro // 128)
    setting = chat.Setting(model, card, {"student": 32}, learns="student", frozen=(("student",),))

    def step(on):
        with on.trace, lora.stack(on.model, "student"):
            train.step_loss(on.model, examples, 65 * len(examples), micro + len(examples))

    room = MEMORY_SHARE * card.memory
    assert 0.8 * room < chat.measured(setting, step).peak < room


def test_margins_along_a_run_cost_by_the_dose_and_a_dose_it_has_not_is_refused(dry, one_layer):
    line = "train --cell fin_tutor --model smollm2-135m --data sample"
    packs = []
    for doses in ("", " --dose-evals 1,2", " --dose-evals 1,2,4,8"):
        status, out, _ = dry(line + doses)
        (found,) = (text for text in out.splitlines() if "margins, a pack" in text)
        assert status == 0
        packs.append(found)
    assert len(set(packs)) == 3
    status, out, err = dry(line + " --dose-evals 16")
    assert status == 2 and "--dose-evals 16: a run on fin_tutor has only 15 steps" in err
