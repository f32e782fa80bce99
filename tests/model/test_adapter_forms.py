"""Adapters as others write them: the forms of PEFT's config and file, against peft's own logits."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import one_line, ours_from, random_ids, reference_model

from em.errors import UserError
from em.model import lora
from em.model.adapter_file import PREFIX
from em.model.decoder import DecoderConfig
from em.model.targets import blocks_of, targets_of

IDS = random_ids(2, 11)
QV = ["q_proj", "v_proj"]
FORMS = {
    "rank 1, one layer of one block": dict(target_modules=["down_proj"], layers_to_transform=[2], r=1),
    "some blocks, by their pattern": dict(
        target_modules=QV, layers_to_transform=[1, 3], layers_pattern="layers"
    ),
    "one block, as a number": dict(target_modules=QV, layers_to_transform=0),
    "layers by their full names": dict(
        target_modules=["model.layers.1.mlp.up_proj", "model.layers.3.self_attn.o_proj"]
    ),
    "a regular expression": dict(target_modules=r".*\.layers\.[02]\..*(k_proj|gate_proj)"),
    "all linear layers": dict(target_modules="all-linear"),
    "but for the head": dict(target_modules="all-linear", exclude_modules=["lm_head"]),
    "but for some": dict(target_modules=list(lora.TARGETS), exclude_modules=r".*\.1\..*|.*\.mlp\..*"),
    "another scale": dict(target_modules=QV, use_rslora=True, lora_alpha=5),
}


def written_by_peft(peft, folder: Path, case: str = "qwen2", **settings):
    """An adapter with weights of its own in `folder`, and the logits of the model that wrote it."""
    config = dict(r=3, lora_alpha=7, task_type="CAUSAL_LM", init_lora_weights=False) | settings
    torch.manual_seed(0)
    model = peft.get_peft_model(reference_model(case), peft.LoraConfig(**config)).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def ours(folder: Path, case: str = "qwen2") -> torch.Tensor:
    model = ours_from(reference_model(case))
    lora.attach(model)
    lora.load_adapter(model, "a", folder)
    with torch.no_grad(), lora.stack(model, "a"):
        return model(IDS)


def change(folder: Path, **keys) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def change_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_pefts_logits(peft, form, tmp_path):
    expected = written_by_peft(peft, tmp_path, **FORMS[form])
    plain = ours_from(reference_model("qwen2"))
    torch.testing.assert_close(ours(tmp_path), expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        assert (plain(IDS) - expected).abs().max() > 0.01


@pytest.mark.parametrize("case", ["llama", "qwen3", "olmo3", "qwen2, sliding, tied"])
def test_every_family_gives_pefts_logits(peft, case, tmp_path):
    settings = dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1, 2], use_rslora=True)
    expected = written_by_peft(peft, tmp_path, case, **settings)
    torch.testing.assert_close(ours(tmp_path, case), expected, atol=2e-5, rtol=1e-4)


def test_all_linear_may_stand_in_the_file_itself_as_other_trainers_write_it(peft, tmp_path):
    expected = written_by_peft(peft, tmp_path, target_modules="all-linear")
    change(tmp_path, target_modules="all-linear")
    torch.testing.assert_close(ours(tmp_path), expected, atol=2e-5, rtol=1e-4)


def test_keys_may_carry_the_adapters_name_but_not_two(peft, tmp_path):
    expected = written_by_peft(peft, tmp_path, target_modules=QV)

    def named(name):
        return lambda tensors: {re.sub(r"(lora_[AB])\.", rf"\1.{name}.", k): t for k, t in tensors.items()}

    plain = load_file(tmp_path / "adapter_model.safetensors")
    change_tensors(tmp_path, named("default"))
    torch.testing.assert_close(ours(tmp_path), expected, atol=2e-5, rtol=1e-4)
    change_tensors(tmp_path, lambda tensors: tensors | named("second")(plain))
    with pytest.raises(UserError, match=r"holds several adapters \(default, second\)") as caught:
        ours(tmp_path)
    one_line(caught)


# -- weights of the base beside the adapter ------------------------------------------------------------------

EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"


@pytest.mark.parametrize("case", ["qwen2", "qwen2, sliding, tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_beside_an_adapter_are_passed_over_where_they_are_the_bases(peft, case, dtype, tmp_path):
    expected = written_by_peft(peft, tmp_path, case, target_modules=QV)
    state = reference_model(case).state_dict()
    names = {EMBEDDING: "model.embed_tokens.weight", HEAD: "lm_head.weight"}
    saved = {key: state[name].to(dtype, copy=True) for key, name in names.items()}
    change_tensors(tmp_path, lambda tensors: tensors | saved)
    change(tmp_path, modules_to_save=["lm_head", "embed_tokens"])
    torch.testing.assert_close(ours(tmp_path, case), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("key", [EMBEDDING, HEAD, f"{PREFIX}lm_head.modules_to_save.default.weight"])
def test_embeddings_that_were_trained_are_refused_by_name(peft, key, tmp_path):
    written_by_peft(peft, tmp_path, target_modules=QV)
    name = "lm_head.weight" if "lm_head" in key else "model.embed_tokens.weight"
    for changed in (lambda t: t * 1.001, lambda t: torch.cat([t, t[:2]])):
        change_tensors(
            tmp_path,
            lambda tensors, f=changed: tensors | {key: f(reference_model("qwen2").state_dict()[name])},
        )
        with pytest.raises(UserError, match=f"a {name} that is not the base's") as caught:
            ours(tmp_path)
        one_line(caught)


def test_what_peft_saves_of_embeddings_by_itself_is_read(peft, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=QV, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(reference_model("qwen2"), config).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert {EMBEDDING, HEAD} <= load_file(tmp_path / "adapter_model.safetensors").keys()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    torch.testing.assert_close(ours(tmp_path), expected, atol=2e-5, rtol=1e-4)


# -- what stays refused --------------------------------------------------------------------------------------

REFUSED = {
    "use_dora": dict(use_dora=True),
    "rank_pattern": dict(rank_pattern={"q_proj": 2}),
    "alpha_pattern": dict(alpha_pattern={"q_proj": 2}),
    "modules_to_save": dict(modules_to_save=["lm_head"]),
    "bias": dict(bias="lora_only"),
    "lora_bias": dict(lora_bias=True),
    "trainable_token_indices": dict(trainable_token_indices=[1, 2]),
    "layer_replication": dict(layer_replication=[[0, 2], [1, 3]]),
    "peft_type": dict(peft_type="LOHA"),
    "target_modules": dict(target_modules=None, target_parameters=["w"]),
    "exclude_modules": dict(exclude_modules="("),
    "layers_pattern": dict(layers_pattern="(", layers_to_transform=[1]),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_changes_the_mathematics_is_refused_by_its_name_and_before_the_model_is_there(
    peft, key, tmp_path
):
    written_by_peft(peft, tmp_path, target_modules=QV)
    change(tmp_path, **REFUSED[key])
    with pytest.raises(UserError, match=key) as caught:
        ours(tmp_path)
    one_line(caught)
    if key != "modules_to_save":  # its weights are compared with the model's
        with pytest.raises(UserError, match=key):
            lora.check_adapters(DecoderConfig.from_hf(reference_model("qwen2").config.to_dict()), [tmp_path])


@pytest.mark.parametrize("layer", ["lm_head", "model.unembed_tokens", "model.embed_tokens"])
def test_an_adapter_on_the_head_or_an_embedding_is_refused_as_that(peft, layer, tmp_path):
    written_by_peft(peft, tmp_path, target_modules="all-linear")
    change_tensors(tmp_path, lambda tensors: tensors | {f"{PREFIX}{layer}.lora_A.weight": torch.ones(3, 48)})
    with pytest.raises(UserError, match=f"{layer}.*on an embedding or the head") as caught:
        ours(tmp_path)
    one_line(caught)


# -- ours, elsewhere -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "blocks", "config"),
    [
        (("q_proj", "v_proj"), None, (["q_proj", "v_proj"], None)),
        (("down_proj",), (2,), (["down_proj"], [2])),
        (None, (1, 2), (sorted(lora.TARGETS), [1, 2])),
    ],
)
def test_an_adapter_on_some_layers_is_peft_s_too_and_named_as_people_do(
    peft, targets, blocks, config, tmp_path
):
    reference = reference_model("qwen2")
    model = ours_from(reference)
    lora.attach(model)
    lora.add_adapter(model, "a", rank=1, alpha=3, targets=targets, blocks=blocks)
    with torch.no_grad():
        for parameter in lora.trainable(model, "a"):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
        lora.save_adapter(model, "a", tmp_path)
        with lora.stack(model, "a"):
            mine = model(IDS)
        theirs = peft.PeftModel.from_pretrained(reference, tmp_path)(input_ids=IDS).logits
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["target_modules"], written["layers_to_transform"]) == config
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * len(model.lora.layers) * (
        len(targets or lora.TARGETS) * len(blocks or range(4))
    ) // (7 * 4)


def test_the_first_ranks_of_a_stack_that_was_saved_are_what_was_first_in_it(tmp_path):
    """Also on layers where the first was not, and for scales that differ."""
    model = ours_from(reference_model("qwen2"))
    lora.attach(model)
    lora.add_adapter(
        model, "first", rank=2, alpha=3, rslora=False, targets=("q_proj", "down_proj"), blocks=(1, 2)
    )
    lora.add_adapter(model, "second", rank=3, alpha=8, seed=1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in ("first", "second"):
            for parameter in lora.trainable(model, name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        lora.save_adapter(model, ("first", "second"), tmp_path)
        lora.load_adapter(model, "again", tmp_path, ranks=2)
        lora.load_adapter(model, "whole", tmp_path)
        found = {}
        for names in (("first",), ("again",), ("first", "second"), ("whole",)):
            with lora.stack(model, *names):
                found[names] = model(IDS)
    torch.testing.assert_close(found["again",], found["first",], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found["whole",], found["first", "second"], atol=1e-4, rtol=1e-5)
    assert (found["whole",] - found["again",]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, None),
        ("all-linear", None),
        ("v,q", ("q_proj", "v_proj")),
        ("down_proj", ("down_proj",)),
        ("q,k,v,o,gate,up,down", None),
    ],
)
def test_targets_are_read_as_people_write_them(text, found):
    assert targets_of(text) == found


@pytest.mark.parametrize("text", ["", "q,x", "lm_head", "q_proj,", ".*"])
def test_targets_that_are_none_are_one_line(text):
    with pytest.raises(UserError, match="no .* among q_proj") as caught:
        targets_of(text)
    one_line(caught)


def test_blocks_are_numbers_and_ranges():
    assert blocks_of(None) is None
    assert blocks_of("24") == (24,)
    assert blocks_of("3, 7-9,8 ,5", 10) == (3, 5, 7, 8, 9)
    for text in ("", "a", "5-3", "-1", "1-", "1.5", "3,,4"):
        with pytest.raises(UserError, match="neither a number nor a range") as caught:
            blocks_of(text)
        one_line(caught)
    with pytest.raises(UserError, match="no block 10; this model has 0 to 9"):
        blocks_of("8-10", 10)
