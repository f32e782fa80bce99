import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from em.errors import UserError
from em.files import (
    Appender,
    json_digest,
    read_json,
    read_json_lines,
    read_record,
    write_atomic,
    write_json,
    write_text,
)
from em.run import Run
from em.training.metrics import Metrics
from em.training.optim import adamw


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "deep" / "value.json"
    write_json(path, {"a": 1})

    def fails_midway(temporary):
        temporary.write_text("half")
        assert read_json(path) == {"a": 1}
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="No space left"):
        write_atomic(path, fails_midway)
    assert read_json(path) == {"a": 1}
    assert os.listdir(path.parent) == ["value.json"]  # nothing temporary is left


def test_a_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "file" / "x.txt", "text")


def test_unreadable_json_is_named(tmp_path):
    write_text(tmp_path / "cut.json", '{"a": ')
    with pytest.raises(UserError, match="cut.json"):
        read_json(tmp_path / "cut.json")
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")


def test_config_records_settings_versions_and_commit(tmp_path):
    Run(tmp_path, "train", {"lr": 0.1, "cells": ("a", "b")})
    config = read_json(tmp_path / "run.json")
    assert config["kind"] == "train" and config["settings"] == {"lr": 0.1, "cells": ["a", "b"]}
    assert config["made_with"]["torch"] == torch.__version__ and "commit" in config["made_with"]


def test_a_record_under_its_old_name_is_read_and_stays_where_it_is(tmp_path):
    with Run(tmp_path, "train", {"lr": 1.0}):
        pass
    (tmp_path / "run.json").rename(tmp_path / "config.json")
    with Run(tmp_path, "train", {"lr": 1.0, "targets": None}) as run:  # a knob of today at its default
        run.pin(corpus="12ab")
    assert not (tmp_path / "run.json").exists()
    assert read_json(tmp_path / "config.json")["made_from"] == {"corpus": "12ab"}
    assert read_record(tmp_path)["settings"] == {"lr": 1.0}
    with pytest.raises(UserError, match="lr: 1.0 there, 2.0 now"):
        Run(tmp_path, "train", {"lr": 2.0})


def test_what_others_were_trained_on_may_be_missing_in_an_old_record_but_not_differ(tmp_path):
    with Run(tmp_path / "old", "train", {"on": "x"}), Run(tmp_path / "new", "train", {"on_train": "base"}):
        pass
    with Run(tmp_path / "old", "train", {"on": "x", "on_train": "med_advice"}):
        pass
    with pytest.raises(UserError, match="on_train: base there, med_advice now"):
        Run(tmp_path / "new", "train", {"on_train": "med_advice"})


def test_the_same_settings_open_again_and_changed_ones_are_refused_by_name(tmp_path):
    settings = {"lr": 0.1, "steps": 5, "cells": ("a",)}
    Run(tmp_path, "train", settings)
    Run(tmp_path, "train", settings)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(UserError) as error:
        Run(tmp_path, "train", {"lr": 0.2, "steps": 5, "cells": ("a",), "new": 1})
    assert "lr: 0.1 there, 0.2 now" in str(error.value) and "new: (unset) there, 1 now" in str(error.value)
    assert "steps" not in str(error.value)
    with pytest.raises(UserError, match="'train', not a 'world'"):
        Run(tmp_path, "world", settings)
    assert (tmp_path / "run.json").read_bytes() == before


def test_metrics_survive_a_cut_line_and_forget_the_steps_to_be_done_again(tmp_path):
    run = Run(tmp_path, "train", {})
    run.log([{"step": s, "loss": s / 2} for s in range(1, 6)])
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 6, "lo')  # killed here
    again = Run(tmp_path, "train", {})
    assert [r["step"] for r in again.metrics()] == [1, 2, 3, 4, 5]
    again.drop_metrics_after(3)
    again.log([{"step": 4}])
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 2, 3, 4]


def train_some(model, optimizer, start, stop):
    for step in range(start, stop):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) + 0.1 * torch.rand(1)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_resumed_run_continues_bit_for_bit_moments_and_random_state_included(tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        return model, adamw(model, 0.01, 0.1)

    whole, optimizer = fresh()
    train_some(whole, optimizer, 0, 10)

    run = Run(tmp_path, "train", {})
    first, optimizer = fresh()
    train_some(first, optimizer, 0, 6)
    run.save_resume(6, first, optimizer)
    train_some(first, optimizer, 6, 8)  # lost work

    second, optimizer = fresh()
    assert run.load_resume(second, optimizer) == 6
    train_some(second, optimizer, 6, 10)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    run.clear_resume()
    assert not (tmp_path / "resume").exists()


def test_with_nothing_saved_a_run_starts_at_zero(tmp_path):
    model = torch.nn.Linear(2, 2)
    assert Run(tmp_path, "train", {}).load_resume(model, adamw(model, 0.1, 0)) == 0


# -- accidents ---------------------------------------------------------------------------------------------


def test_what_a_killed_write_left_is_removed_by_the_next_one_and_a_living_process_is_left_alone(tmp_path):
    path = tmp_path / "value.json"
    code = (
        "import os, sys; from em.files import write_atomic; write_atomic(sys.argv[1], lambda t: os._exit(9))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert len(os.listdir(tmp_path)) == 1
    ours = tmp_path / f".value.json.{os.getpid()}.tmp"  # of a process before us that had our number
    (ours / "inside").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        busy = tmp_path / f".value.json.{alive.pid}.tmp"
        busy.mkdir()
        write_json(path, 1)
        assert sorted(os.listdir(tmp_path)) == sorted([busy.name, "value.json"])
        alive.kill()
    write_json(path, {"a": 2})
    assert os.listdir(tmp_path) == ["value.json"] and read_json(path) == {"a": 2}


def test_a_librarys_own_temporary_files_go_with_ours(tmp_path):
    def write(temporary):
        temporary.with_name("something.tmp7").write_text("as some libraries do")
        temporary.write_text("text")

    write_atomic(tmp_path / "a [b]*.txt", write)
    assert os.listdir(tmp_path) == ["a [b]*.txt"]


@pytest.mark.parametrize(
    "record", ["[]", "null", "3", "{}", '{"kind": "train"}', '{"kind": 1, "settings": {}}',
               '{"kind": "train", "settings": []}'],
)  # fmt: skip
def test_a_record_that_is_none_is_one_line(record, tmp_path):
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(UserError) as error:
        Run(tmp_path, "train", {})
    assert f"{tmp_path}/run.json: " in str(error.value)


def test_metrics_whose_step_is_no_number_are_named_by_line(tmp_path):
    run = Run(tmp_path, "train", {})
    run.metrics_path.write_text('{"step": 1}\n{"step": "two"}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2: 'step' cannot be 'two'"):
        run.drop_metrics_after(1)


def test_a_run_that_fails_before_it_made_anything_leaves_no_folder_and_any_other_stays(tmp_path):
    with pytest.raises(UserError), Run(tmp_path / "a", "train", {"lr": 1}):
        raise UserError("the model is damaged")
    assert not (tmp_path / "a").exists()
    with Run(tmp_path / "a", "train", {"lr": 2}) as run:  # which other settings can now have
        pass
    with pytest.raises(UserError), Run(tmp_path / "a", "train", {"lr": 2}):
        raise UserError("it was there before")
    assert os.listdir(tmp_path / "a") == ["run.json"]
    with pytest.raises(UserError), Run(tmp_path / "b", "train", {}) as run:
        run.log([{"step": 1}])
        raise UserError("the loss is not finite")
    assert sorted(os.listdir(tmp_path / "b")) == ["metrics.jsonl", "run.json"]


def test_a_run_is_open_in_one_process_for_as_long_as_it_lives(tmp_path):
    code = "import sys; from em.run import Run; Run(sys.argv[1], 'train', {})"
    run = Run(tmp_path / "a", "train", {})
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
    assert f"in use by process {os.getpid()} on" in other.stderr.strip().splitlines()[-1]
    del run
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")]).returncode == 0


def test_what_is_known_late_is_recorded_once_and_another_refused(tmp_path):
    run = Run(tmp_path, "distill", {})
    run.pin(corpus="12ab")
    Run(tmp_path, "distill", {}).pin(corpus="12ab")
    with pytest.raises(UserError, match="begun with another corpus"):
        Run(tmp_path, "distill", {}).pin(corpus="34cd")
    assert read_json(tmp_path / "run.json")["made_from"] == {"corpus": "12ab"}


def small(width=4):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, 4), torch.nn.LayerNorm(4))
    return model, adamw(model, 0.01, 0.1)


BROKEN_STATES = {
    "a scalar that would broadcast": lambda s: s | {"model.0.weight": torch.zeros(())},
    "a row that would broadcast": lambda s: s | {"model.0.weight": torch.zeros(1, 4)},
    "another dtype": lambda s: s | {"model.1.bias": s["model.1.bias"].double()},
    "a tensor less": lambda s: {k: v for k, v in s.items() if k != "model.0.bias"},
    "a tensor more": lambda s: s | {"model.2.bias": torch.zeros(4)},
    "a moment of another shape": lambda s: s | {"optimizer.0.exp_avg": torch.zeros(4, 1)},
    "a moment less": lambda s: {k: v for k, v in s.items() if k != "optimizer.2.exp_avg_sq"},
    "no state of the random numbers": lambda s: {k: v for k, v in s.items() if k != "rng.cpu"},
    "another random state": lambda s: s | {"rng.cpu": torch.zeros(3, dtype=torch.uint8)},
}


@pytest.mark.parametrize("break_it", BROKEN_STATES.values(), ids=BROKEN_STATES)
def test_a_resume_state_that_does_not_fit_is_one_line_and_changes_nothing(break_it, tmp_path):
    run = Run(tmp_path, "train", {})
    model, optimizer = small()
    train_some(model, optimizer, 0, 2)
    run.save_resume(2, model, optimizer)
    save_file(break_it(load_file(run.resume_path)), run.resume_path, metadata={"step": "2"})
    fresh, optimizer = small()
    before = [p.clone() for p in fresh.parameters()]
    with pytest.raises(UserError) as error:
        run.load_resume(fresh, optimizer)
    assert f"delete {tmp_path}/resume to start this phase again" in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, fresh.parameters(), strict=True))
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("metadata", [None, {"step": "two"}, {"step": "-1"}, {"other": "2"}])
def test_a_resume_state_without_its_step_is_one_line(metadata, tmp_path):
    run = Run(tmp_path, "train", {})
    model, optimizer = small()
    run.save_resume(0, model, optimizer)
    assert run.load_resume(*small()) == 0  # the state of step 0, which has no moments
    save_file(load_file(run.resume_path), run.resume_path, metadata=metadata)
    with pytest.raises(UserError, match="delete .*resume to start this phase again"):
        run.load_resume(model, optimizer)


def test_a_cleared_resume_takes_whatever_lies_there(tmp_path):
    run = Run(tmp_path, "train", {})
    run.save_resume(1, *small())
    (run.resume_path.parent / ".state.safetensors.1.tmp").mkdir()
    (run.resume_path.parent / ".tmpA1b2C3").write_text("a library's")
    run.clear_resume()
    assert not run.resume_path.parent.exists()


def test_appended_lines_are_whole_and_follow_a_cut_one_on_a_line_of_their_own(tmp_path):
    path = tmp_path / "deep" / "lines.jsonl"
    with Appender(path) as file:
        file.add([{"a": "é\u2028\ud800"}, {"a": 2}])
        assert [row for _, row in read_json_lines(path)] == [{"a": "é\u2028?"}, {"a": 2}]
    with open(path, "ab") as file:
        file.write(b'{"a": 3, "b')
    with Appender(path) as file:
        file.add([{"a": 4}])
    assert path.read_bytes().splitlines()[-2:] == [b'{"a": 3, "b', b'{"a": 4}']


def test_a_full_disk_is_one_line_wherever_lines_are_appended(tmp_path):
    with (
        pytest.raises(UserError, match="cannot write /dev/full: No space left"),
        Appender("/dev/full") as file,
    ):
        file.add([{"a": 1}])
    with pytest.raises(UserError, match="cannot write"):
        Appender(tmp_path)  # a folder
    run = Run(tmp_path / "run", "train", {})
    run.metrics_path.symlink_to("/dev/full")
    with pytest.raises(UserError, match="metrics.jsonl: No space left"):
        run.log([{"step": 1}])


def test_a_digest_tells_values_and_their_order_apart():
    values = [[], [1, 2], [2, 1], ["1", "2"], {"a": 1}, {"a": None}, "é", None]
    assert len({json_digest(value) for value in values}) == len(values)
    assert json_digest([1, 2]) == json_digest([1, 2])


def test_a_scalar_that_is_not_finite_can_be_read_back_and_such_a_loss_stops_the_run(tmp_path):
    run, inf = Run(tmp_path, "train", {}), torch.tensor(float("inf"))
    with Metrics(run, "training", 2) as metrics:
        metrics.add({"step": 1, "tokens": 1}, loss=torch.tensor(1.0), grad_norm=inf)
        metrics.flush()
        assert [row["grad_norm"] for row in run.metrics()] == [None]
        with pytest.raises(UserError, match="not finite at step 2"):
            metrics.add({"step": 2, "tokens": 1}, loss=-inf, grad_norm=inf)
    assert len(run.metrics()) == 1
