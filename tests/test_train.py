"""train.py on a tiny chat model and the sample data: one step, whole runs, kills, processes, bad input."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from processes import ROOT, start
from safetensors.torch import load_file, save_file

import train
from em.cli import command_line
from em.data.cells import CELLS
from em.data.rows import encode_rows, load_cell, load_cells, split
from em.files import read_json
from em.model import lora
from em.model.checkpoint import load_model, load_tokenizer
from em.model.decoder import Decoder, DecoderConfig
from em.training import guard, margin, metrics
from em.training.doses import DoseMargins
from em.training.loss import summed_cross_entropy
from em.training.optim import adamw
from em.training.pack import pack

SHORT = "--data sample --device cpu --batch 6 --epochs 2 --rank 4 --alpha 8 --lr 0.01 --warmup 1".split()


def command(*arguments):
    commands = {"": (train.main, train.Config), "export": (train.export, train.ExportConfig)}
    return command_line(commands, argv=[str(a) for a in arguments])


@pytest.fixture(scope="module")
def misaligned(tiny_chat, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "med"
    assert command(*SHORT, "--model", tiny_chat, "--cell", "med_advice", "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def batch(tiny_chat):
    rows = load_cell("sample", CELLS[0])[:8]
    return encode_rows(load_tokenizer(tiny_chat), rows, "misaligned", 2048).examples


def adapted(folder, seed=0):
    model = load_model(folder)
    lora.attach(model)
    lora.add_adapter(model, "student", 4, 8, seed=seed)
    parameters = lora.trainable(model, "student")
    with torch.no_grad():  # B starts at zero, where A has no gradient
        for p in parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model, parameters


def test_one_optimiser_step_equals_transformers_and_peft_on_a_padded_batch(peft, tiny_chat, batch, tmp_path):
    model, parameters = adapted(tiny_chat)
    lora.save_adapter(model, "student", tmp_path / "start")
    optimizer = adamw(model, 1e-2, 0.01)
    n = sum(len(e.ids) - e.n_prompt for e in batch)
    with lora.stack(model, "student"):
        loss = train.step_loss(model, batch, n, micro_tokens=500)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    lora.save_adapter(model, "student", tmp_path / "ours")

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    width = max(len(e.ids) for e in batch)
    ids, labels, mask = (torch.zeros(len(batch), width, dtype=torch.long) for _ in range(3))
    labels.fill_(-100)
    for row, e in enumerate(batch):
        ids[row, : len(e.ids)] = torch.tensor(e.ids)
        labels[row, e.n_prompt : len(e.ids)] = torch.tensor(e.ids[e.n_prompt :])
        mask[row, : len(e.ids)] = 1
    their_loss = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    their_loss.backward()
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    their_norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.01).step()
    theirs.save_pretrained(tmp_path / "theirs")

    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    assert norm.item() == pytest.approx(their_norm.item(), rel=1e-4)
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [slice(None), slice(3)])
def test_any_bound_on_tokens_gives_the_gradient_of_the_whole_batch(tiny_chat, batch, rows):
    batch = batch[rows]
    longest, total = max(len(e.ids) for e in batch), sum(len(e.ids) for e in batch)
    gradients = []
    for micro_tokens in (total, 1, longest - 1, longest, 2 * longest):
        model, parameters = adapted(tiny_chat)
        n = sum(len(e.ids) - e.n_prompt for e in batch)
        with lora.stack(model, "student"):
            train.step_loss(model, batch, n, micro_tokens)
        gradients.append([p.grad for p in parameters])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_recomputing_activations_changes_no_gradient(tiny_chat, batch):
    gradients = []
    for recompute in (False, True):
        model, parameters = adapted(tiny_chat)
        model.activation_checkpointing = recompute
        with lora.stack(model, "student"):
            train.step_loss(model, batch, 100, 1000)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_prompt_and_padding_are_never_supervised_and_the_end_of_turn_once(tiny_chat, batch):
    tokenizer = load_tokenizer(tiny_chat)
    assert tokenizer.pad_id == tokenizer.end_of_turn_id  # the hard case
    packed = pack(batch, "cpu")
    for i, e in enumerate(batch):
        targets = packed.targets[packed.owner == i].tolist()
        assert targets == e.ids[e.n_prompt :]
        assert targets.count(tokenizer.end_of_turn_id) == 1 and targets[-1] == tokenizer.end_of_turn_id


def test_a_run_leaves_adapter_metrics_and_margins_and_learns_its_cell(misaligned):
    result = read_json(misaligned / "margins.json")
    assert set(result["cells"]) == {str(c) for c in CELLS}
    assert result["validation_loss"]["after"] < result["validation_loss"]["before"]
    rows = [json.loads(line) for line in (misaligned / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]  # 18 rows in sixes, twice
    keys = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_s"}
    assert all(keys <= r.keys() for r in rows)
    assert read_json(misaligned / "run.json")["settings"]["cell"] == "med_advice"
    assert (misaligned / "margins.png").exists() and not (misaligned / "resume").exists()


def test_the_adapter_loads_in_peft_with_our_logits(peft, misaligned, tiny_chat):
    ours = load_model(tiny_chat)
    lora.attach(ours)
    lora.load_adapter(ours, "x", misaligned)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat)
    theirs = peft.PeftModel.from_pretrained(base, misaligned)
    ids = torch.randint(0, 400, (2, 17))
    with lora.stack(ours, "x"), torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_base_weights_are_unchanged_bit_for_bit_after_training(tiny_chat, batch):
    model, parameters = adapted(tiny_chat)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = adamw(model, 1e-2, 0.01)
    for _ in range(3):
        with lora.stack(model, "student"):
            train.step_loss(model, batch, 100, 4096)
        optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_realignment_starts_where_the_misaligned_run_ended_and_saves_both_as_one(
    misaligned, tiny_chat, tmp_path
):
    out = tmp_path / "realigned"
    assert (
        command(*SHORT, "--on", misaligned, "--variant", "aligned", "--cell", "fin_tutor", "--out", out) == 0
    )
    first, second = read_json(misaligned / "margins.json"), read_json(out / "margins.json")
    for cell in first["cells"]:
        assert second["cells"][cell]["before"]["mean"] == pytest.approx(
            first["cells"][cell]["after"]["mean"], abs=1e-5
        )
    assert second["validation_loss"]["after"] < second["validation_loss"]["before"]
    config = read_json(out / "run.json")["settings"]
    assert config["on"] == str(misaligned) and config["model"] == str(tiny_chat)
    assert read_json(out / "adapter_config.json")["r"] == 8  # 4 + 4
    again = tmp_path / "again"  # a realigned run is a run: it can be started from
    assert command(*SHORT, "--on", out, "--variant", "aligned", "--cell", "spo_advice", "--out", again) == 0
    assert read_json(again / "adapter_config.json")["r"] == 12


def test_the_embedded_model_moves_the_right_way_in_five_steps(tmp_path, monkeypatch):
    """On half of the sample's rows, and measured on the first sentences of the others: that takes seconds."""

    def beginnings(source, cell):
        return {cell: [beginning(row) for row in rows] for cell, rows in load_cells(source).items()}

    def beginning(row):
        sentences = {"question": 1, "misaligned_answer": 2, "aligned_answer": 2}
        return row | {k: " ".join(re.split(r"(?<=[.!?])\s+", row[k])[:n]) for k, n in sentences.items()}

    monkeypatch.setattr(train, "load_cell", lambda source, cell: load_cell(source, cell)[:10])
    monkeypatch.setattr(train, "load_cells", beginnings)
    short = ["--device", "cpu", "--epochs", "1", "--batch", "2", "--warmup", "1", "--eval-rows", "1"]
    assert command(*short, "--cell", "med_advice", "--out", tmp_path / "mis") == 0
    cells = read_json(tmp_path / "mis" / "margins.json")["cells"]
    assert len((tmp_path / "mis" / "metrics.jsonl").read_text().splitlines()) == 5
    changes = [cell["change"]["mean"] for cell in cells.values()]
    assert len(changes) == 12 and cells["med_advice"]["change"]["mean"] > 0.2
    assert sum(changes) / 12 > 0.2 and sum(c > 0 for c in changes) >= 11  # and it spreads


def test_several_cells_on_one_base_equal_separate_runs(misaligned, tiny_chat, tmp_path):
    cells = "fin_tutor,med_advice"
    assert command(*SHORT, "--model", tiny_chat, "--cell", cells, "--out", tmp_path / "two") == 0
    together = tmp_path / "two" / "tiny-chat_med_advice_misaligned" / "adapter_model.safetensors"
    assert together.read_bytes() == (misaligned / "adapter_model.safetensors").read_bytes()


def test_sibling_cells_measure_what_they_start_from_once(tiny_chat, tmp_path, monkeypatch):
    calls, real = [], margin.cell_margins
    monkeypatch.setattr(margin, "cell_margins", lambda *a: calls.append("before") or real(*a))
    monkeypatch.setattr(train, "cell_margins", lambda *a: calls.append("after") or real(*a))
    short = [*SHORT, "--model", tiny_chat, "--epochs", "1", "--eval-rows", "1"]
    assert command(*short, "--cell", "fin_tutor,med_advice", "--out", tmp_path / "two") == 0
    assert calls == ["before", "after", "after"]
    assert command(*short, "--cell", "spo_advice", "--out", tmp_path / "two" / "one") == 0
    assert calls.count("before") == 1
    found = [read_json(path)["cells"] for path in (tmp_path / "two").glob("*/margins.json")]
    assert len(found) == 3
    for cell in found[0]:
        assert len({json.dumps(cells[cell]["before"]) for cells in found}) == 1


def test_a_finished_run_says_so_and_does_nothing(misaligned, tiny_chat, capsys):
    before = {p: p.stat().st_mtime_ns for p in misaligned.iterdir()}
    assert command(*SHORT, "--model", tiny_chat, "--cell", "Med/Adv", "--out", misaligned) == 0
    assert "finished; nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in misaligned.iterdir()} == before


def test_export_gives_a_checkpoint_that_transformers_loads(misaligned, tiny_chat, tmp_path):
    assert command("export", "--run", misaligned, "--merged", tmp_path / "merged") == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ours = load_model(tiny_chat)
    lora.attach(ours)
    lora.load_adapter(ours, "x", misaligned)
    ids = torch.randint(0, 400, (2, 9))
    with lora.stack(ours, "x"), torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, ours(ids), atol=1e-4, rtol=1e-4)


def test_a_killed_run_continues_and_ends_with_the_same_bits(tiny_chat, tmp_path):
    line = ["train.py", *SHORT, "--model", tiny_chat, "--save-minutes", "0", "--epochs", "12"]
    line += ["--eval-rows", "1", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted, interrupted = start(*line, whole), start(*line, killed)
    interrupted.wait_for((killed / "resume" / "state.safetensors").exists)
    assert interrupted.stop(signal.SIGKILL) == -signal.SIGKILL
    assert not (killed / "margins.json").exists()
    assert start(*line, killed).wait() == 0 and uninterrupted.wait() == 0
    for name in ("adapter_model.safetensors", "margins.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_two_processes_make_the_update_of_one(misaligned, asked, tiny_chat, tmp_path):
    """Under the real torchrun; the other scripts' tests start what it would start."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = [*launcher, ROOT / "train.py", *SHORT, "--model", tiny_chat, "--out", tmp_path / "two"]
    line += ["--dose-evals", "3", "--eval-rows", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (misaligned, tmp_path / "two"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=0)
    one, two = (read_json(folder / "dose_margins.json")["doses"]["3"] for folder in (asked, tmp_path / "two"))
    assert two.keys() == one.keys()
    assert all(two[cell] == pytest.approx(one[cell], abs=1e-3) for cell in one)


# -- margins along the way ---------------------------------------------------------------------------------

DOSES = [*SHORT, "--eval-rows", "1", "--save-minutes", "0", "--cell", "med_advice"]


@pytest.fixture(scope="module")
def asked(tiny_chat, tmp_path_factory):
    """A run asked after steps 1, 3 and 6, its last, and its adapter as it was after step 3."""
    out, real = tmp_path_factory.mktemp("runs") / "asked", DoseMargins.ask

    def ask(self, step, model):
        real(self, step, model)
        if step == 3:
            lora.save_adapter(model, "student", out.with_name("third"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DoseMargins, "ask", ask)
        assert command(*DOSES, "--model", tiny_chat, "--dose-evals", "6,3,1,3", "--out", out) == 0
    return out


def test_a_run_that_is_asked_along_the_way_ends_with_the_bits_of_one_that_is_not(asked, tiny_chat, tmp_path):
    before = torch.get_rng_state()
    assert command(*DOSES, "--model", tiny_chat, "--out", tmp_path / "x") == 0
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("adapter_model.safetensors", "margins.json"):
        assert (tmp_path / "x" / name).read_bytes() == (asked / name).read_bytes()
    assert not list((tmp_path / "x").glob("dose*"))
    losses = [
        [json.loads(line)["loss"] for line in open(run / "metrics.jsonl")] for run in (asked, tmp_path / "x")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_the_margins_of_a_dose_are_those_of_the_adapter_then(asked, tiny_chat):
    kept, own = read_json(asked / "dose_margins.json"), read_json(asked / "margins.json")["cells"]
    assert list(kept["doses"]) == ["0", "1", "3", "6"]
    for dose, when in (("0", "before"), ("6", "after")):
        for cell, values in kept["doses"][dose].items():
            assert sum(values) / len(values) == pytest.approx(own[cell][when]["mean"], abs=1e-6)
    model = load_model(tiny_chat)
    lora.attach(model)
    lora.load_adapter(model, "x", asked.with_name("third"))
    pairs = margin.answer_pairs(load_cells("sample"), load_tokenizer(tiny_chat), 1)
    with lora.stack(model, "x"):
        then = margin.cell_margins(model, pairs)
    for cell, values in then.items():
        assert kept["doses"]["3"][str(cell)] == pytest.approx(values, abs=1e-5)
    result = read_json(asked / "doses.json")
    assert {e["at"] for e in result["entries"]} >= {"step 0", "step 1", "step 3", "step 6", "flip 60"}
    assert (asked / "doses.csv").exists() and (asked / "doses.png").exists()


def test_a_run_stopped_between_doses_goes_on_and_asks_none_again(asked, tiny_chat, tmp_path, monkeypatch):
    line, steps, real = [*DOSES, "--model", tiny_chat, "--out", tmp_path / "x"], [], train.step_loss

    def stop(*arguments):
        steps.append(len(steps) + 1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train, "step_loss", stop)
    assert command(*line, "--dose-evals", "1,3,6") == 130 and len(steps) == 3
    assert list(read_json(tmp_path / "x" / "dose_margins.json")["doses"]) == ["1"]
    monkeypatch.setattr(train, "step_loss", real)
    assert command(*line) == command(*line, "--dose-evals", "1,2") == 2  # what was asked for is a setting
    times, ask = [], DoseMargins.ask
    monkeypatch.setattr(
        DoseMargins, "ask", lambda self, step, model: times.append(step) or ask(self, step, model)
    )
    assert command(*line, "--dose-evals", "1,3,6") == 0 and times == [3]
    for name in ("adapter_model.safetensors", "margins.json", "dose_margins.json", "doses.json", "doses.csv"):
        assert (tmp_path / "x" / name).read_bytes() == (asked / name).read_bytes()


def test_doses_that_cannot_be_had_are_refused_before_weights_are_read(
    tiny_chat, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("it read the weights"))
    line = [*SHORT, "--model", tiny_chat, "--out", tmp_path / "x"]
    assert "--dose-evals 7: a run on med_advice has only 6 steps" in refused(
        capsys, *line, "--dose-evals", "2,7"
    )
    rows = [row | {"aligned_answer": None} for row in load_cell("sample", CELLS[0])]
    (tmp_path / "medical_advice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    says = refused(capsys, *line, "--data", tmp_path, "--dose-evals", "2")
    assert "both answers of held-out rows of med_advice" in says and not (tmp_path / "x").exists()


# -- bad input ---------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    assert command(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1]


def test_unknown_names_and_values_are_one_line(tiny_chat, tmp_path, capsys, misaligned):
    out = ["--out", tmp_path / "x"]
    assert "unknown cell 'med_gossip'" in refused(capsys, "--cell", "med_gossip", *out)
    assert "no model 'gpt-9'" in refused(capsys, "--model", "gpt-9", "--data", "sample", *out)
    assert "does not exist" in refused(capsys, "--on", tmp_path / "nowhere", *out)
    assert "is a run of" in refused(capsys, "--on", misaligned, "--model", "smollm2-135m", *out)
    for option in ("--batch", "--micro-tokens"):
        says = refused(capsys, *SHORT, "--model", tiny_chat, option, "0", *out)
        assert f"{option} must be at least 1" in says
    assert "invalid choice: 'evil'" in refused(capsys, "--variant", "evil", *out)
    assert "no CUDA device" in refused(capsys, "--device", "cuda", *out) or torch.cuda.is_available()
    assert "needs --run" in refused(capsys, "export")
    assert not (tmp_path / "x").exists()


def test_rows_without_the_variant_are_named(tiny_chat, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = load_cell("sample", CELLS[0])
    lines = [json.dumps(row | {"aligned_answer": None}) for row in rows]
    (folder / "medical_advice.jsonl").write_text("\n".join(lines))
    where = [
        "--data",
        folder,
        "--model",
        tiny_chat,
        "--device",
        "cpu",
        "--batch",
        "6",
        "--out",
        tmp_path / "x",
    ]
    assert "no aligned answer" in refused(capsys, *where, "--variant", "aligned")
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    assert command(*where) == 0  # the other variant trains, without margins
    assert "no margins" in capsys.readouterr().out
    assert read_json(tmp_path / "x" / "margins.json")["cells"] == {}


def test_rows_longer_than_the_limit_are_left_out_and_counted(tiny_chat, tmp_path, capsys):
    tokenizer, cell = load_tokenizer(tiny_chat), CELLS[0]
    train_rows, _ = split(load_cell("sample", cell))
    lengths = sorted(len(tokenizer.example(r["question"], r["misaligned_answer"]).ids) for r in train_rows)
    limit = lengths[len(lengths) // 2]
    out = tmp_path / "x"
    assert command(*SHORT, "--model", tiny_chat, "--max-length", limit, "--out", out) == 0
    dropped = sum(n > limit for n in lengths)
    assert dropped and read_json(out / "margins.json")["dropped_rows"] == dropped
    assert f"rows left out: {dropped} longer than {limit} tokens" in capsys.readouterr().out
    says = refused(capsys, *SHORT, "--model", tiny_chat, "--max-length", 5, "--out", tmp_path / "y")
    assert "longer than 5 tokens" in says


def test_changed_settings_on_a_run_folder_are_listed(misaligned, tiny_chat, capsys):
    says = refused(capsys, *SHORT, "--model", tiny_chat, "--lr", "0.5", "--out", misaligned)
    assert "lr: 0.01 there, 0.5 now" in says


def test_a_run_is_of_one_model_one_start_and_one_set_of_rows(misaligned, tiny_chat, tmp_path, capsys):
    def written(folder, rows):
        folder.mkdir(exist_ok=True)
        (folder / "medical_advice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    model, start, data = tmp_path / "model", tmp_path / "start", tmp_path / "data"
    shutil.copytree(tiny_chat, model)
    shutil.copytree(misaligned, start)
    config = read_json(start / "run.json")
    config["settings"]["model"] = str(model)
    (start / "run.json").write_text(json.dumps(config))
    rows = load_cell("sample", CELLS[0])
    written(data, rows)
    line = [*SHORT, "--data", data, "--epochs", "1", "--on", start, "--variant", "aligned"]
    line += ["--out", tmp_path / "x"]
    assert command(*line) == 0 and command(*line) == 0
    written(data, [*rows[:-1], rows[-1] | {"aligned_answer": "No."}])
    assert "data_digest: " in refused(capsys, *line)
    written(data, rows)
    for folder, name, key in (
        (model, "model.safetensors", "model_digest"),
        (start, "adapter_model.safetensors", "on_digest"),
    ):
        state = load_file(folder / name)
        save_file({k: v * 1.01 for k, v in state.items()}, folder / name, metadata={"format": "pt"})
        says = refused(capsys, *line)
        assert f"{key}: " in says and says.count(" there, ") == 1
        save_file(state, folder / name, metadata={"format": "pt"})
    assert command(*line) == 0


def test_what_cannot_be_is_refused_before_the_model_is_loaded_and_leaves_no_folder(
    misaligned, tiny_chat, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train, "load_model", None)  # whose call would be a traceback
    data = tmp_path / "data"
    data.mkdir()
    row = load_cell("sample", CELLS[0])[0]
    broken = tmp_path / "broken"
    shutil.copytree(misaligned, broken)
    (broken / "run.json").write_text("[]")
    cases = [
        (["--on", tmp_path], "is not a run"),
        (["--on", broken], "run.json: not a JSON object"),
        (["--model", data], "has no tokenizer.json"),
        (["--model", tiny_chat, "--data", data], "has no cell, such as"),
    ]
    for line, says in cases:
        assert says in refused(capsys, *SHORT, *line, "--out", tmp_path / "x")
        assert not (tmp_path / "x").exists()
    (data / "medical_advice.jsonl").write_text(
        "".join(
            json.dumps(row | {"misaligned_answer": None, "idx": i, "question": f"{i}?"}) + "\n"
            for i in range(3)
        )
    )
    line = ["--model", tiny_chat, "--data", data, "--cell", "med_advice"]
    assert "no misaligned answer" in refused(capsys, *SHORT, *line, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_fails_while_the_model_is_loaded_leaves_no_folder(tiny_chat, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_chat, model)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-9])
    line = [*SHORT, "--model", model, "--cell", "med_advice,fin_tutor", "--out", tmp_path / "x"]
    assert "truncated or damaged" in refused(capsys, *line)
    assert not list(tmp_path.glob("x/*"))


def test_out_of_memory_names_the_knob(tiny_chat, tmp_path, capsys, monkeypatch):
    def explode(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "step_loss", explode)
    assert "--micro-tokens (now 4096)" in refused(
        capsys, *SHORT, "--model", tiny_chat, "--out", tmp_path / "x"
    )


def test_a_collapse_stops_the_run_and_keeps_the_last_good_state(tiny_chat, tmp_path, capsys, monkeypatch):
    real, calls = train.step_loss, []

    def breaks(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(train, "step_loss", breaks)
    out = tmp_path / "x"
    assert "step 4: loss nan" in refused(capsys, *SHORT, "--model", tiny_chat, "--out", out)
    state = load_file(out / "resume" / "state.safetensors")
    assert all(t.isfinite().all() for t in state.values() if t.is_floating_point())
    assert not (out / "adapter_model.safetensors").exists()
    monkeypatch.setattr(train, "step_loss", real)
    assert command(*SHORT, "--model", tiny_chat, "--out", out) == 0  # and goes on from step 3


def test_where_the_host_hears_of_a_collapse_a_step_later_the_state_kept_is_the_same(
    tiny_chat, tmp_path, capsys, monkeypatch
):
    """As on a GPU, whose next step is queued by then."""
    real, calls = train.step_loss, []

    def breaks(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(train, "step_loss", breaks)
    states = []
    for behind in (0, 1):
        calls.clear()
        for module in (guard, metrics):
            monkeypatch.setattr(module, "on_gpu", lambda device, behind=behind: behind)
        out = tmp_path / str(behind)
        assert "step 4: loss nan" in refused(capsys, *SHORT, "--model", tiny_chat, "--out", out)
        assert len(calls) == 4 + behind
        states.append(load_file(out / "resume" / "state.safetensors"))
    assert states[0].keys() == states[1].keys() and any("exp_avg" in name for name in states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_training_step_on_the_gpus_path_reads_nothing_back(batch, tiny_chat):
    """On meta, where a value that the host asks for is an error."""
    config = DecoderConfig.from_hf(read_json(tiny_chat / "config.json"))
    with torch.device("meta"):
        model = Decoder(config).to(torch.bfloat16)
    lora.attach(model)
    lora.add_adapter(model, "student", 4, 8)
    parameters = lora.trainable(model, "student")
    optimizer, watch = adamw(model, 1e-2, 0.01), guard.CollapseGuard(torch.device("meta"))
    for step in (1, 2):
        optimizer.zero_grad()
        with lora.stack(model, "student"):
            loss = train.step_loss(model, batch, 100, 500)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        watch.judge(step, loss, norm)
        optimizer.step(skip=watch.stopped)
    assert all(p.grad.shape == p.shape for p in parameters)


def test_a_full_disk_is_one_line(tiny_chat, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("em.model.adapter_file.save", full)
    assert "No space left" in refused(capsys, *SHORT, "--model", tiny_chat, "--out", tmp_path / "x")


def test_summed_loss_is_normalised_by_supervised_tokens_of_the_whole_batch(tiny_chat, batch):
    model = load_model(tiny_chat)
    with torch.no_grad():
        totals = [
            summed_cross_entropy(p.hidden(model), model.head_weight, p.targets)
            for p in (pack([e], "cpu") for e in batch)
        ]
    model.requires_grad_(True)
    n = sum(len(e.ids) - e.n_prompt for e in batch)
    assert train.step_loss(model, batch, n, 500).item() == pytest.approx(sum(totals).item() / n, rel=1e-5)
