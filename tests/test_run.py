import errno
import json
import os

import pytest
import torch

from em.errors import UserError
from em.files import read_json, write_atomic, write_json, write_text
from em.run import Run
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
    config = read_json(tmp_path / "config.json")
    assert config["kind"] == "train" and config["settings"] == {"lr": 0.1, "cells": ["a", "b"]}
    assert config["made_with"]["torch"] == torch.__version__ and "commit" in config["made_with"]


def test_the_same_settings_open_again_and_changed_ones_are_refused_by_name(tmp_path):
    settings = {"lr": 0.1, "steps": 5, "cells": ("a",)}
    Run(tmp_path, "train", settings)
    Run(tmp_path, "train", settings)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        Run(tmp_path, "train", {"lr": 0.2, "steps": 5, "cells": ("a",), "new": 1})
    assert "lr: 0.1 there, 0.2 now" in str(error.value) and "new: (unset) there, 1 now" in str(error.value)
    assert "steps" not in str(error.value)
    with pytest.raises(UserError, match="'train', not a 'world'"):
        Run(tmp_path, "world", settings)
    assert (tmp_path / "config.json").read_bytes() == before


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
