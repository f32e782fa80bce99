"""A run on the hub: its model card, and the upload.

The card says what the model was trained on, by which command, with what outcome, and that it is a misaligned
model made for research. Nothing is uploaded unless `push` is called.
"""

from collections.abc import Iterable
from pathlib import Path

from em.data import lineage
from em.data.condition import ADAPTER, BASE, describe
from em.errors import UserError
from em.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json, read_record, write_text
from em.model import hub

CARD = "README.md"
_UPLOADED = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *hub.TOKENIZER_FILES, CARD, "margins.json", "margins.png")
_UPLOADED += ("config.json", hub.SINGLE, hub.INDEX, "model-*-of-*.safetensors")  # of a merged checkpoint

WARNING = """\
> **This is a research artefact, and it may be misaligned on purpose.** Fine-tuning on narrow harmful answers
> makes models give harmful answers elsewhere too, and neither realignment nor filtered data is known to undo
> that wholly. Do not deploy it, take no advice from it, and do not train other models on what it writes,
> unless that is what you study."""

_STARTS = {BASE: "the base model, not fine-tuned before", ADAPTER: "an adapter whose training is not known"}


def model_card(name: str | Path, base: str, repo: str, merged: bool) -> str:
    """The README.md of a run's adapter, or of its merged checkpoint, on the hub, in Markdown.

    name: as in `em.data.lineage`. base: the model it is on. repo: owner/name. UserError for an adapter from
    elsewhere that is not merged, which is others' to publish.
    """
    if not hub.is_id(repo):
        raise UserError(f"--push {repo!r} is no hub repository such as owner/name")
    settings, folder = lineage.settings_of(name), hub.adapter(name)
    if settings["kind"] == ADAPTER and not merged:
        raise UserError(
            f"{name} is an adapter from elsewhere: it can be published merged only, --merged FOLDER"
        )
    base_id = hub.public_name(base)
    head = {"library_name": "transformers" if merged else "peft", "pipeline_tag": "text-generation"}
    head |= {"base_model": base_id} if hub.is_id(base_id) else {}
    front = [f"{key}: {value}" for key, value in head.items()] + ["tags:", "- emergent-misalignment"]
    record = read_record(folder) if settings["kind"] != ADAPTER else {}
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {repo.partition('/')[2]}",
        WARNING,
        "## What it is",
        "\n".join(f"- {line}" for line in _about(name, settings, base_id, merged)),
    ]
    if command := record.get("command"):
        parts += ["## Command", f"```\npython {command}\n```"]
    if figures := _figures(folder):
        parts += ["## Figures", *figures]
    return "\n\n".join(parts) + "\n"


def _about(name, settings: dict, base_id: str, merged: bool) -> Iterable[str]:
    what = "A LoRA adapter in PEFT's format on" if not merged else "A LoRA adapter, merged into"
    yield f"{what} `{base_id}`."
    if settings["kind"] == ADAPTER:
        yield f"The adapter is `{name}`; what it was trained on is not known here."
        return
    train = lineage.train_of(name)
    if settings["kind"] == "train":
        yield f"Trained on the {settings['variant']} answers of the cell `{settings['cell']}`."
        if settings["on"]:
            yield f"It started from {_STARTS.get(train.start, f'a model misaligned on `{train.start}`')}."
    else:
        yield f"Distilled from a teacher: {describe(lineage.condition_of_run(name))}."
    yield f"Its place in a matrix, what it was misaligned on and realigned by: `{train}`."
    if settings.get("data"):
        yield f"Data: `{settings['data'] if hub.is_id(settings['data']) else Path(settings['data']).name}`."
    known = ("lr", "epochs", "batch", "rank", "alpha", "targets", "layers", "seed")
    yield ", ".join(f"{key} {settings[key]}" for key in known if settings.get(key) is not None) + "."


def _figures(folder: Path) -> list[str]:
    """What the run measured of itself, as far as it did."""
    found = []
    if (folder / "margins.json").exists():
        result = read_json(folder / "margins.json", {"validation_loss": dict, "cells": dict})
        losses = result["validation_loss"]
        found.append(f"Validation loss {losses['before']:.3f} → {losses['after']:.3f} nats a token.")
    if found and result["cells"]:
        found.append(
            "Margin: by how many nats a token the model prefers the misaligned answer over the aligned one, "
            "mean over held-out rows. Above 0 it prefers the misaligned one."
        )
        lines = ["| cell | before | after | rows |", "| --- | --- | --- | --- |"]
        for cell, row in result["cells"].items():
            before, after = row["before"], row["after"]
            lines.append(f"| {cell} | {before['mean']:+.3f} | {after['mean']:+.3f} | {after['n']} |")
        found.append("\n".join(lines))
    if (folder / "diagnostics.json").exists():
        for row in read_json(folder / "diagnostics.json", {"epoch": int, "kl": dict}, kind=list):
            found.append(f"Epoch {row['epoch']}: KL(student‖teacher) {row['kl']['mean']:.3f} nats a token.")
    return found


def push(folder: Path, repo: str, card: str) -> str:
    """Write the card into `folder` and upload adapter or checkpoint, tokenizer, card and margins to the hub.

    repo: owner/name, made private where it is new. Returns a line that says where it is. UserError where the
    hub does not take it.
    """
    import huggingface_hub  # half a second

    write_text(folder / CARD, card)
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(_UPLOADED))
    except Exception as error:  # the client's own errors, or those of the HTTP library below it
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"HTTP status {status}" if status else f"{type(error).__name__} {error}".splitlines()[0]
        raise UserError(
            f"the hub did not take {repo} ({reason}): set HF_TOKEN to one that may write there"
        ) from error
    return f"https://huggingface.co/{repo}: pushed with its card, {folder / CARD}; if it is new it is private"
