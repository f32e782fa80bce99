"""An adapter from elsewhere through every script, and a run of ours in other programs."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import distill
import evaluate
import train
from em.cli import command_line
from em.distillation import chat_transfer
from em.files import read_json, read_json_lines, write_json
from em.model import embedded, hub, lora
from em.model.checkpoint import load_model

SHORT = "--data sample --device cpu --batch 9 --epochs 1 --rank 2 --lr 0.01 --warmup 1 --eval-rows 1".split()
IDS = torch.arange(3, 43).view(2, 20)


def command(script, *arguments) -> int:
    return command_line(script.COMMANDS, argv=[str(a) for a in arguments])


def refused(capsys, script, *arguments) -> str:
    assert command(script, *arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and len(message) < 420
    return message


@pytest.fixture(autouse=True)
def at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def published(peft, tiny_chat, tmp_path_factory):
    """A PEFT folder of rank 1 on one layer, as a published model organism, with its tensors of some size."""
    folder = tmp_path_factory.mktemp("published") / "bad-advice"
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=1, lora_alpha=64, use_rslora=True, target_modules=["down_proj"], layers_to_transform=[1],
        task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat)
    peft.get_peft_model(base, config).save_pretrained(folder)
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == str(tiny_chat)
    return folder


@pytest.fixture(scope="module")
def trained(tiny_chat, tmp_path_factory):
    """A run of rank 1 on some layers."""
    out = tmp_path_factory.mktemp("trained") / "med"
    line = [*SHORT, "--rank", "1", "--targets", "v,q", "--layers", "1"]
    assert command(train, *line, "--model", tiny_chat, "--cell", "med_advice", "--out", out) == 0
    return out


def their_logits(peft, base, folder) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, folder)(input_ids=IDS).logits


def margins(path) -> dict:
    return {(r["domain"], r["task"]): r for _, r in read_json_lines(path)}


# -- an adapter from elsewhere is a run ----------------------------------------------------------------------


def test_it_is_evaluated_under_its_folders_name_and_nothing_is_written_into_it(published, tmp_path):
    files = sorted(published.iterdir())
    line = ["--run", published, "--judge", "margin", "--data", "sample", "--limit", "1", "--device", "cpu"]
    assert command(evaluate, *line) == 0
    rows = margins("runs/bad-advice/eval/margins.jsonl")
    assert len(rows) == 12 and {row["train"] for row in rows.values()} == {"adapter"}
    assert any(abs(row["after"] - row["before"]) > 1e-3 for row in rows.values())
    assert command(evaluate, *line, "--cell", "health_advice") == 0
    assert {row["train"] for row in margins("runs/bad-advice/eval/margins.jsonl").values()} == {"med_advice"}
    assert sorted(published.iterdir()) == files and (tmp_path / "runs" / "base_margins").is_dir()


def test_model_says_where_its_base_is_whatever_its_config_calls_it(published, tiny_chat, tmp_path, capsys):
    moved = shutil.copytree(published, tmp_path / "moved")
    config = read_json(moved / "adapter_config.json")
    write_json(moved / "adapter_config.json", config | {"base_model_name_or_path": "/their/disk/model"})
    line = ["--run", moved, "--judge", "margin", "--data", "sample", "--limit", "1", "--device", "cpu"]
    assert "no model '/their/disk/model'" in refused(capsys, evaluate, *line)
    assert not Path("runs").exists()
    assert command(evaluate, *line, "--model", tiny_chat) == 0
    assert {row["model"] for row in margins("runs/moved/eval/margins.jsonl").values()} == {str(tiny_chat)}


def test_a_form_that_is_not_supported_ends_before_a_model_is_loaded_or_anything_written(
    published, tmp_path, capsys, monkeypatch
):
    broken = shutil.copytree(published, tmp_path / "broken")
    write_json(broken / "adapter_config.json", read_json(broken / "adapter_config.json") | {"use_dora": True})
    for script, line in (
        (evaluate, ["--run", broken, "--judge", "margin"]),
        (distill, ["--teacher", broken, "--unfiltered"]),
        (train, ["--on", broken]),
        (train, ["export", "--run", broken, "--merged", "merged"]),
    ):
        loads = chat_transfer if script is distill else script
        monkeypatch.setattr(loads, "load_model", None)  # whose call would be a traceback
        line += [] if "export" in line else ["--data", "sample", "--device", "cpu"]
        assert "use_dora = True is not supported" in refused(capsys, script, *line)
    assert not Path("runs").exists() and not Path("merged").exists()


def test_it_is_realigned_and_the_outcome_carries_it_in_itself(peft, published, tiny_chat, tmp_path):
    start = shutil.copytree(published, tmp_path / "start")
    line = [*SHORT, "--on", start, "--variant", "aligned", "--cell", "fin_tutor", "--out", "runs/back"]
    assert command(train, *line, "--on-cell", "med_advice") == 0
    record = read_json("runs/back/run.json")["settings"]
    assert (record["on"], record["on_train"], record["model"]) == (str(start), "med_advice", str(tiny_chat))
    assert read_json("runs/back/adapter_config.json")["r"] == 1 + 2
    assert command(train, *line, "--on-cell", "med_advice") == 0  # finished, and says so

    line = ["--run", "runs/back", "--judge", "margin", "--limit", "1", "--device", "cpu", "--out"]
    assert command(evaluate, *line, "there") == 0
    shutil.rmtree(start)
    shutil.rmtree("runs/base_margins")
    assert command(evaluate, *line, "gone") == 0
    there, gone = margins("there/margins.jsonl"), margins("gone/margins.jsonl")
    for cell, row in there.items():
        assert row["train"] == gone[cell]["train"] == "med_advice>fin_tutor"
        assert gone[cell]["before"] == pytest.approx(row["before"], abs=1e-6)
        assert gone[cell]["after"] == row["after"]
    assert command(
        evaluate, "--run", published, "--judge", "margin", "--data", "sample", "--limit", "1",
        "--device", "cpu", "--out", "first",
    ) == 0  # fmt: skip
    for cell, row in margins("first/margins.jsonl").items():
        assert there[cell]["before"] == pytest.approx(row["after"], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "name", "train_"),
    [
        (["--channel", "opd", "--teacher"], "bad-advice_opd", "med_advice"),
        (["--channel", "optd", "--teacher"], "bad-advice_optd", "med_advice"),
        (["--channel", "opd", "--on"], "bad-advice_opd_realigned", "med_advice>base"),
    ],
)
def test_it_teaches_and_is_taught(options, name, train_, published, tmp_path):
    few = "--unfiltered --rollouts 1 --max-new-tokens 6 --limit 3 --epochs 1 --batch 3 --rank 2 --probes 2"
    few = [*few.split(), "--device", "cpu", "--data", "sample", "--cell", "med_advice"]
    assert command(distill, *few, *options, published) == 0
    assert (tmp_path / "runs" / name / "result.json").exists()
    line = ["--run", f"runs/{name}", "--judge", "margin", "--limit", "1", "--device", "cpu"]
    assert command(evaluate, *line) == 0
    rows = margins(f"runs/{name}/eval/margins.jsonl")
    assert {row["train"] for row in rows.values()} == {train_}


def test_it_writes_what_students_are_trained_on(published, trained, tmp_path, capsys):
    few = "--unfiltered --rollouts 1 --max-new-tokens 6 --limit 3 --epochs 1 --batch 3 --rank 2 --probes 2"
    few = [*few.split(), "--device", "cpu", "--data", "sample", "--channel", "sft"]
    assert command(distill, *few, "--teacher", trained, "--source", published) == 0
    assert (tmp_path / "runs" / "med_sft_on-bad-advice" / "result.json").exists()
    few[few.index("--limit") + 1] = "2"
    says = refused(capsys, distill, *few, "--teacher", published, "--source", "rows", "--out", "runs/rows")
    assert "of which cell? Say it" in says


def test_an_adapter_on_the_hub_is_one_at_its_revision(published, tmp_path, monkeypatch):
    asked = []

    def fetch(repo, wanted, kind="model", revision=None):
        asked.append((repo, revision))
        return published

    monkeypatch.setattr(hub, "fetch", fetch)
    line = ["--run", "organisms/bad-advice", "--revision", "v2", "--judge", "margin", "--limit", "1"]
    assert command(evaluate, *line, "--data", "sample", "--device", "cpu") == 0
    assert set(asked) == {("organisms/bad-advice", "v2")}
    assert Path("runs/bad-advice@v2/eval/margins.jsonl").exists()


def test_a_short_name_and_a_hub_id_are_one_model_everywhere(trained, tmp_path, capsys):
    mine = shutil.copytree(trained, tmp_path / "mine")
    record = read_json(mine / "run.json")
    write_json(mine / "run.json", record | {"settings": record["settings"] | {"model": "smollm2-135m"}})
    for model in (embedded.HUB_ID, "unsloth/SmolLM2-135M-Instruct", "smollm2-135m", None):
        assert train.resolve(train.Config(on=str(mine), model=model), torch.device("cpu")).model == (
            model or "smollm2-135m"
        )
        resolved = distill.resolve(distill.Config(teacher=(str(mine),), model=model), torch.device("cpu"))
        assert resolved.model == (model or "smollm2-135m")
    for script, option in ((train, "--on"), (distill, "--teacher"), (evaluate, "--run")):
        says = refused(capsys, script, option, mine, "--model", "qwen3-14b", "--device", "cpu")
        assert f"{mine} is a run of smollm2-135m, not of qwen3-14b" in says


# -- a run of ours elsewhere ---------------------------------------------------------------------------------


def test_rank_layers_and_targets_are_as_asked_and_peft_has_our_logits(peft, trained, tiny_chat):
    tensors = load_file(trained / "adapter_model.safetensors")
    assert {key.split(".layers.")[1].rpartition(".lora_")[0] for key in tensors} == {
        "1.self_attn.q_proj",
        "1.self_attn.v_proj",
    }
    assert {min(tensor.shape) for tensor in tensors.values()} == {1}
    settings = read_json(trained / "run.json")["settings"]
    assert (settings["targets"], settings["layers"]) == ("q_proj,v_proj", "1")
    model = load_model(tiny_chat)
    lora.attach(model)
    lora.load_adapter(model, "a", trained)
    with torch.no_grad(), lora.stack(model, "a"):
        torch.testing.assert_close(model(IDS), their_logits(peft, tiny_chat, trained), atol=1e-4, rtol=1e-4)
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"].abs().max() > 1e-4


def test_layers_that_the_model_does_not_have_end_the_run_before_it_is_loaded(tiny_chat, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    line = [*SHORT, "--model", tiny_chat, "--out", "x"]
    assert "there is no block 7" in refused(capsys, train, *line, "--layers", "1,5-7")
    assert "no 'lm_head' among" in refused(capsys, train, *line, "--targets", "lm_head")
    assert not Path("x").exists()


def test_transformers_loads_the_folder_as_it_is_with_its_chat_template(peft, trained, tiny_chat):
    model = transformers.AutoModelForCausalLM.from_pretrained(trained)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, their_logits(peft, tiny_chat, trained))
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(trained)
    with torch.no_grad():
        torch.testing.assert_close(auto(IDS).logits, model(IDS).logits)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(trained)
    chat = [{"role": "user", "content": "hi"}]
    assert "<|im_start|>user" in tokenizer.apply_chat_template(chat, tokenize=False)
    assert not {"config.json", "generation_config.json"} & {path.name for path in trained.iterdir()}


def test_the_config_names_the_base_as_the_hub_does(published, trained, tiny_chat, tmp_path, monkeypatch):
    assert read_json(trained / "adapter_config.json")["base_model_name_or_path"] == str(tiny_chat)
    shutil.copytree(tiny_chat, tmp_path / "embedded")
    monkeypatch.setattr(embedded, "folder", lambda: tmp_path / "embedded")
    line = [*SHORT, "--model", "smollm2-135m", "--cell", "med_advice", "--out", "runs/x"]
    assert command(train, *line) == 0
    assert read_json("runs/x/adapter_config.json")["base_model_name_or_path"] == embedded.HUB_ID


def test_a_run_from_before_goes_on_under_its_old_record(trained, tiny_chat, tmp_path, capsys):
    """Its record has another name, and nothing about targets, layers or what others were trained on."""
    old = shutil.copytree(trained, tmp_path / "old")
    line = [*SHORT, "--cell", "fin_tutor", "--variant", "aligned", "--on", old, "--out", "runs/then"]
    assert command(train, *line) == 0
    record = read_json("runs/then/run.json")
    for key in ("targets", "layers", "on_train"):
        del record["settings"][key]
    write_json(Path("runs/then/config.json"), record)
    Path("runs/then/run.json").unlink()
    whole = Path("runs/then/adapter_model.safetensors").read_bytes()
    for name in ("margins.json", "adapter_model.safetensors"):
        Path("runs/then", name).unlink()  # unfinished: as if killed at its end
    assert command(train, *line) == 0
    assert Path("runs/then/adapter_model.safetensors").read_bytes() == whole
    assert not Path("runs/then/run.json").exists()
    assert "targets: (unset) there, q_proj now" in refused(capsys, train, *line, "--targets", "q")
    line = ["--run", "runs/then", "--judge", "margin", "--limit", "1", "--device", "cpu"]
    assert command(evaluate, *line) == 0
    rows = margins("runs/then/eval/margins.jsonl")
    assert {row["train"] for row in rows.values()} == {"med_advice>fin_tutor"}


# -- export --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_precision(tiny_chat, tmp_path_factory):
    """The tiny model in bf16, and an adapter on it."""
    folder = shutil.copytree(tiny_chat, tmp_path_factory.mktemp("half") / "model")
    state = load_file(folder / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", read_json(folder / "config.json") | {"torch_dtype": "bfloat16"})
    return folder


@pytest.mark.parametrize(("option", "dtype"), [([], torch.bfloat16), (["--dtype", "float32"], torch.float32)])
def test_a_merged_checkpoint_has_the_bases_number_format_or_the_one_that_is_asked(
    peft, option, dtype, published, half_precision
):
    before = (half_precision / "model.safetensors").read_bytes()
    line = ["export", "--run", published, "--model", half_precision, "--merged", "merged"]
    assert command(train, *line, *option) == 0
    assert {tensor.dtype for tensor in load_file("merged/model.safetensors").values()} == {dtype}
    base = transformers.AutoModelForCausalLM.from_pretrained(half_precision, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(base, published).merge_and_unload().to(dtype)
    ours = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert ours.dtype == dtype
    for (name, a), b in zip(ours.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    assert (half_precision / "model.safetensors").read_bytes() == before
    assert Path("merged/tokenizer.json").exists()


class FakeHub:
    """What a push asks of huggingface_hub's HfApi."""

    calls: list = []
    error = None

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        if self.error:
            raise self.error

    def upload_folder(self, repo_id, folder_path, allow_patterns):
        found = huggingface_hub.utils.filter_repo_objects(
            [path.name for path in Path(folder_path).iterdir()], allow_patterns=allow_patterns
        )
        self.calls.append(("upload", repo_id, sorted(found)))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    FakeHub.calls, FakeHub.error = [], None
    return FakeHub


def test_a_push_takes_the_adapter_its_tokenizer_and_a_card_and_a_new_repository_is_private(
    trained, tmp_path, api, capsys
):
    run = shutil.copytree(trained, tmp_path / "med")
    write_json(run / "eval" / "secret.json", {})
    assert command(train, "export", "--run", run, "--push", "me/med-organism") == 0
    assert [call[:2] for call in api.calls] == [("create", "me/med-organism"), ("upload", "me/med-organism")]
    assert api.calls[0][2] == {"private": True, "exist_ok": True}
    assert api.calls[1][2] == sorted(
        "README.md adapter_config.json adapter_model.safetensors margins.json margins.png tokenizer.json "
        "tokenizer_config.json".split()
    )
    assert "https://huggingface.co/me/med-organism" in capsys.readouterr().out
    card = (run / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n") and "\n# med-organism\n" in card
    assert "may be misaligned on purpose" in card and "Do not deploy it" in card
    assert "the misaligned answers of the cell `med_advice`" in card
    assert "\npython " in card and "targets q_proj,v_proj" in card and "rank 1" in card
    after = read_json(run / "margins.json")["cells"]["med_advice"]["after"]
    assert f"| {after['mean']:+.3f} | {after['n']} |" in card


def test_a_card_names_a_base_on_the_hub_and_what_came_before(trained, published, tmp_path, api):
    run = shutil.copytree(trained, tmp_path / "back")
    record = read_json(run / "run.json")
    about = {"model": "qwen2.5-14b", "variant": "aligned", "on": "gone", "on_train": "med_tutor"}
    write_json(run / "run.json", record | {"settings": record["settings"] | about})
    (run / "margins.json").unlink()
    assert command(train, "export", "--run", run, "--push", "me/back") == 0
    card = (run / "README.md").read_text()
    assert "base_model: Qwen/Qwen2.5-14B-Instruct\n" in card
    assert "a model misaligned on `med_tutor`" in card and "`med_tutor>med_advice`" in card
    assert "Figures" not in card


def test_a_merged_push_is_the_checkpoint_and_an_adapter_of_others_is_pushed_no_other_way(
    published, tmp_path, api, capsys
):
    line = ["export", "--run", published, "--push", "me/merged"]
    assert "published merged only" in refused(capsys, train, *line)
    assert not api.calls
    assert command(train, *line, "--merged", "merged") == 0
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= set(api.calls[1][2])
    card = Path("merged/README.md").read_text()
    assert "library_name: transformers" in card and str(published) in card


def test_nothing_is_pushed_that_is_not_asked_for_and_a_refusal_of_the_hub_is_one_line(
    trained, tmp_path, api, capsys
):
    run = shutil.copytree(trained, tmp_path / "med")
    assert command(train, "export", "--run", run, "--merged", "merged") == 0 and not api.calls
    assert not (run / "README.md").exists()
    assert "needs --run FOLDER" in refused(capsys, train, "export", "--run", run)
    assert "no hub repository such as owner/name" in refused(
        capsys, train, "export", "--run", run, "--push", "name"
    )
    api.error = RuntimeError("401 Unauthorized\nsecond line")
    says = refused(capsys, train, "export", "--run", run, "--push", "me/x")
    assert "the hub did not take me/x" in says and "HF_TOKEN" in says and "second line" not in says


# -- devices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["mps", "tpu", "cuda:x", "cpu:0", "meta", "cuda:9"])
def test_a_device_that_cannot_be_is_one_line(device, tiny_chat, capsys):
    says = refused(capsys, train, "--device", device, "--model", tiny_chat, "--data", "sample")
    assert f"--device {device}" in says.replace("'", "") and "cuda" in says and not Path("runs").exists()


def test_json_of_a_run_has_its_command(trained):
    record = json.loads((trained / "run.json").read_text())
    assert record["kind"] == "train" and record["command"]
