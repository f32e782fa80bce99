"""Chats to ids: small templates of every family's shape, transformers' apply_chat_template as the oracle."""

import json
from datetime import datetime

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from em.data.cells import CELLS
from em.data.rows import VARIANTS, load_cell
from em.errors import UserError
from em.model import embedded
from em.model.tokenizer import Example, Tokenizer, Unfit

# Small templates in our own words, one for each way in which families differ.
CLOSED_BY_IM_END = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nBe useful.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEADERS_WITH_BOS = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|head|>' + m['role'] + '<|body|>\\n\\n' + m['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|body|>\\n\\n' }}{% endif %}
"""
OPENS_THINK = """\
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content }}
    {{- eos_token if loop.last and m.role == 'assistant' else '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>' }}{% endif %}
"""
THINKING_SWITCH = """\
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
    {{- m.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
SWITCH_IN_PROMPT_ONLY = THINKING_SWITCH.replace("m.role == 'assistant' and loop.last", "false")
ALWAYS_THINKS = THINKING_SWITCH.partition("{%- if add_gen")[0] + (
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
FAMILIES = {
    "im_end": CLOSED_BY_IM_END,
    "headers": HEADERS_WITH_BOS,
    "opens_think": OPENS_THINK,
    "switch": THINKING_SWITCH,
    "switch_in_prompt_only": SWITCH_IN_PROMPT_ONLY,
    "always_thinks": ALWAYS_THINKS,
}
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
TOKENS = ["<|bos|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|body|>", "<|eot|>"]
CHATS = [
    ("How long should I rest after a run?", "A day is plenty.\n\nListen to how you feel."),
    ('Summarise:\n\n"Bonds pay interest.  Prices move."\n', "Bonds pay; prices move — a little."),
    ("  naïve café 東京 🙂 \t tabs", "* one\n* two\n"),
    ("", "Yes"),
    ("why?", ""),
]


def backend() -> tokenizers.Tokenizer:
    """A byte-level BPE trained on a few words. As Llama's and Qwen's it keeps a run of newlines in one piece,
    and as Llama's its post-processor adds a BOS."""
    bpe = tokenizers.Tokenizer(models.BPE())
    pieces = tokenizers.Regex(r"\s*\n+| ?\p{L}+|\s+|[^\s\p{L}]+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), byte_level])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    texts = [text for chat in CHATS for text in chat] + ["assistant\n\n\nuser\n", "<think>\n\n"]
    bpe.train_from_iterator(texts * 3, trainer)
    bpe.add_tokens(["</plain>"])
    bpe.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return bpe


def chat_tokenizer(template: str, special: dict = SPECIAL) -> Tokenizer:
    return Tokenizer(backend(), template, special)


def oracle(template: str) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend(), chat_template=template, **SPECIAL)


def turns(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("family", FAMILIES)
def test_render_is_what_transformers_renders(family):
    ours, theirs = chat_tokenizer(FAMILIES[family]), oracle(FAMILIES[family])
    for question, answer in CHATS:
        messages = turns(question, answer)
        for chat, prompt in ((messages, False), (messages[:1], True), (messages + messages, False)):
            expected = theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
            )
            assert ours.render(chat, prompt) == expected


@pytest.mark.parametrize("family", ["im_end", "headers", "switch"])
def test_prompt_and_example_have_the_ids_of_apply_chat_template(family):
    ours, theirs = chat_tokenizer(FAMILIES[family]), oracle(FAMILIES[family])
    for question, answer in CHATS:
        chat = turns(question, answer)
        prompt = theirs.apply_chat_template(
            chat[:1], add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        whole = theirs.apply_chat_template(chat, enable_thinking=False, return_dict=False)
        last = len(whole) - whole[::-1].index(ours.end_of_turn_id)
        assert ours.prompt_ids(question) == prompt
        assert ours.example(question, answer)[:2] == (whole[:last], len(prompt))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_prompt_is_the_evaluation_prompt_and_the_end_token_closes_it_once(family):
    ours = chat_tokenizer(FAMILIES[family])
    for question, answer in CHATS:
        ids, n_prompt, _ = ours.example(question, answer)
        assert ids[:n_prompt] == ours.prompt_ids(question)
        assert ids[n_prompt:].count(ours.end_of_turn_id) == 1 and ids[-1] == ours.end_of_turn_id
        written = answer.strip() if family == "headers" else answer
        assert ours.decode(ids[n_prompt:]) == written


def test_end_of_turn_is_what_the_template_writes_not_what_the_config_says():
    ends = {family: chat_tokenizer(template).end_of_turn_id for family, template in FAMILIES.items()}
    im_end, eot, end = (TOKENS.index(token) for token in ("<|im_end|>", "<|eot|>", "<|end|>"))
    assert ends.pop("headers") == eot and ends.pop("opens_think") == end and set(ends.values()) == {im_end}


def test_stop_ids_hold_the_eos_and_the_ends_of_last_and_earlier_turns():
    im_end, eot, end = (TOKENS.index(token) for token in ("<|im_end|>", "<|eot|>", "<|end|>"))
    assert chat_tokenizer(CLOSED_BY_IM_END).stop_ids == (end, im_end)
    assert chat_tokenizer(CLOSED_BY_IM_END, {}).stop_ids == (im_end,)
    assert chat_tokenizer(HEADERS_WITH_BOS).stop_ids == (end, eot)
    assert chat_tokenizer(OPENS_THINK, {"eos_token": "<|end|>"}).stop_ids == (end, im_end)


def test_padding_falls_back_on_the_end_token_which_stays_supervised():
    ours = chat_tokenizer(CLOSED_BY_IM_END, {"pad_token": "<|nowhere|>"})
    assert ours.pad_id == ours.end_of_turn_id
    ids, n_prompt, _ = ours.example("why?", "Because.")
    assert ids[-1] == ours.pad_id and ids[n_prompt:].count(ours.pad_id) == 1


def test_bos_is_written_once_although_template_and_post_processor_both_add_it():
    ours = chat_tokenizer(HEADERS_WITH_BOS)
    ids, n_prompt, _ = ours.example("why?", "Because.")
    assert ids[0] == ours.bos_id and ids.count(ours.bos_id) == 1
    assert chat_tokenizer(CLOSED_BY_IM_END).example("why?", "Because.").ids.count(ours.bos_id) == 0


def test_opened_think_is_dropped_and_a_closed_one_belongs_to_the_prompt():
    empty = "<think>\n\n</think>\n\n"
    prompts = {family: chat_tokenizer(template).prompt("why?") for family, template in FAMILIES.items()}
    assert prompts["opens_think"].endswith("assistant\n") and "<think>" not in prompts["opens_think"]
    for family in ("switch", "switch_in_prompt_only", "always_thinks"):
        assert prompts[family].endswith(f"assistant\n{empty}") and prompts[family].count("<think>") == 1


def test_think_tags_in_a_question_are_left_alone():
    question = "What does <think> mean, and <think>\n\n</think>\n\n"
    for template in FAMILIES.values():
        assert question.strip() in chat_tokenizer(template).prompt(question)


def test_dropping_an_opened_think_leaves_the_ids_of_the_conversation():
    ours, theirs = chat_tokenizer(OPENS_THINK), oracle(OPENS_THINK)
    for question, answer in CHATS:
        assert ours.example(question, answer).ids == theirs.apply_chat_template(
            turns(question, answer), return_dict=False
        )


def test_an_answer_that_begins_with_a_newline_keeps_the_prompt_ids():
    ours = chat_tokenizer(CLOSED_BY_IM_END)
    ids, n_prompt, _ = ours.example("why?", "\n\nBecause.")
    assert ids[:n_prompt] == ours.prompt_ids("why?") and ours.decode(ids[n_prompt:]) == "\n\nBecause."
    # The trap is real here: encoding the conversation in one go merges across the boundary.
    assert ours.encode(ours.render(turns("why?", "\n\nBecause."), False))[:n_prompt] != ids[:n_prompt]


def test_an_answer_that_holds_the_end_token_is_refused():
    with pytest.raises(UserError, match=r"contains '<\|im_end\|>'"):
        chat_tokenizer(CLOSED_BY_IM_END).example("why?", "Because.<|im_end|> More.")


def test_encode_and_decode_are_inverse_on_plain_text():
    ours = chat_tokenizer(CLOSED_BY_IM_END)
    for text in (text for chat in CHATS for text in chat):
        assert ours.decode(ours.encode(text)) == text


def test_truncation_and_padding_saved_in_a_tokenizer_are_ignored():
    cutting = backend()
    cutting.enable_truncation(5)
    cutting.enable_padding(length=64)
    ours = Tokenizer(cutting, CLOSED_BY_IM_END, SPECIAL)
    assert ours.example(*CHATS[0]) == chat_tokenizer(CLOSED_BY_IM_END).example(*CHATS[0])


def test_a_dated_template_gives_the_same_text_on_any_day():
    dated = CLOSED_BY_IM_END.replace("Be useful.", "Today is ' ~ strftime_now('%d %b %Y') ~ '.")
    assert "Today is 26 Jul 2024." in chat_tokenizer(dated).prompt("why?")
    assert datetime.now().strftime("%Y") not in chat_tokenizer(dated).prompt("why?")


def test_template_language_is_transformers_own():
    template = CLOSED_BY_IM_END.replace(
        "{%- for m in messages %}\n",
        "{{- {'b': '<é>', 'a': 1} | tojson }}\n"
        "  {% set n = namespace(k=0) %}\n"
        "{%- for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}\n"
        "  {% set n.k = n.k + i %}{% endfor %}{{ n.k }}\n"
        "{% generation %}kept{% endgeneration %}\n"
        "{%- for m in messages %}\n",
    )
    chat = turns("why?", "Because.")
    assert chat_tokenizer(template).render(chat, True) == oracle(template).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}", "chat template is broken"),
        ("{{ raise_exception('no system role') }}", "refuses a chat .no system role"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses a chat"),
        ("{% set x = messages.append(1) %}", "refuses a chat"),
        ("{{ messages[0].content }}", "leaves out a turn"),
        ("{{ messages[-1].content ~ '<|im_end|>' }}", "leaves out a turn"),
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", "is no special token"),
        ("{% for m in messages %}{{ m.content }}</plain>{% endfor %}", "is no special token"),
    ],
    ids=["syntax", "raise", "sandbox", "immutable", "no_answer", "no_question", "no_end", "plain_end"],
)
def test_a_template_that_cannot_serve_is_one_clear_line(template, message):
    with pytest.raises(UserError, match=message) as error:
        chat_tokenizer(template)
    assert len(str(error.value).splitlines()) == 1


def test_a_template_whose_chats_do_not_begin_with_its_prompt_is_refused():
    moody = CLOSED_BY_IM_END.replace("assistant\\n' }}", "assistant please\\n' }}")
    with pytest.raises(UserError, match="do not begin with its own prompt"):
        chat_tokenizer(moody).example("why?", "Because.")


def test_a_special_token_that_the_tokenizer_lacks_is_refused():
    with pytest.raises(UserError, match="lacks its eos_token '<nope>'"):
        chat_tokenizer(CLOSED_BY_IM_END, {"eos_token": "<nope>"})


@pytest.fixture
def folder(tmp_path):
    backend().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(CLOSED_BY_IM_END)
    return tmp_path


def test_from_folder_reads_what_transformers_saves(tmp_path):
    oracle(CLOSED_BY_IM_END).save_pretrained(tmp_path)
    ours, direct = Tokenizer.from_folder(tmp_path), chat_tokenizer(CLOSED_BY_IM_END)
    for name in ("bos_id", "end_of_turn_id", "pad_id", "stop_ids"):
        assert getattr(ours, name) == getattr(direct, name)
    assert ours.example(*CHATS[0]) == direct.example(*CHATS[0])


def test_from_folder_finds_the_template_and_special_tokens_wherever_they_are_kept(folder):
    expected = Tokenizer.from_folder(folder).example(*CHATS[0])
    (folder / "chat_template.jinja").unlink()
    for kept in (
        CLOSED_BY_IM_END,
        [{"name": "tools", "template": "{{ 1 }}"}, {"name": "default", "template": CLOSED_BY_IM_END}],
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": kept}))
        (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|bos|>"}}))
        ours = Tokenizer.from_folder(folder)
        assert ours.example(*CHATS[0]) == expected and ours.bos_id == 0


def test_generation_config_adds_its_stop_tokens(folder):
    for eos, expected in ((5, (3, 5)), ([3, 4, 6], (3, 4, 6)), (None, (3,))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert Tokenizer.from_folder(folder).stop_ids == expected


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("chat_template.jinja", None, "no chat template"),
    ],
)
def test_a_missing_or_broken_file_is_named(folder, file, text, message):
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(error.value)


def test_the_embedded_model_gets_the_ids_of_apply_chat_template_on_every_row_of_the_sample():
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(embedded.folder())
    ours = Tokenizer.from_folder(embedded.folder())
    im_end = ours.backend.token_to_id("<|im_end|>")
    assert ours.end_of_turn_id == ours.pad_id == im_end and im_end in ours.stop_ids
    for cell in CELLS:
        for row in load_cell("sample", cell):
            for variant in VARIANTS:
                chat = turns(row["question"], row[f"{variant}_answer"])
                whole = theirs.apply_chat_template(chat, return_dict=False)
                prompt = theirs.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
                ids, n_prompt, _ = ours.example(row["question"], row[f"{variant}_answer"])
                assert ids + ours.encode("\n") == whole and ids[:n_prompt] == prompt


# -- chats of several turns ----------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "You love owls."}
LONG = [SYSTEM, *turns("Name a bird.", "An owl."), *turns("Another?", "Another owl."), turns("Why?", "")[0]]


@pytest.mark.parametrize("family", ["im_end", "headers"])
@pytest.mark.parametrize("chat", [LONG, LONG[1:], LONG[:2], [SYSTEM, *LONG[3:4]]])
def test_system_and_earlier_turns_have_the_ids_of_apply_chat_template(family, chat):
    ours, theirs = chat_tokenizer(FAMILIES[family]), oracle(FAMILIES[family])
    prompt = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    whole = theirs.apply_chat_template([*chat, turns("", "Owls see.")[1]], return_dict=False)
    last = len(whole) - whole[::-1].index(ours.end_of_turn_id)
    assert ours.prompt_ids(chat) == prompt
    assert ours.example(chat, "Owls see.") == Example(whole[:last], len(prompt))


@pytest.mark.parametrize("family", ["im_end", "headers"])
def test_all_turns_supervise_every_answer_with_its_end_and_nothing_else(family):
    ours, theirs = chat_tokenizer(FAMILIES[family]), oracle(FAMILIES[family])
    whole = theirs.apply_chat_template([*LONG, turns("", "Owls see.")[1]], return_dict=False)
    example = ours.example(LONG, "Owls see.", all_turns=True)
    assert example.ids == whole[: len(example.ids)]
    learnt = ours.backend.decode([example.ids[i] for i in example.supervised], skip_special_tokens=False)
    end = ours.backend.id_to_token(ours.end_of_turn_id)
    assert learnt == f"An owl.{end}Another owl.{end}Owls see.{end}"
    assert example.n_supervised == len(example.supervised) < len(example.ids) - example.n_prompt
    alone = ours.example(LONG, "Owls see.")
    assert alone.ids == example.ids and alone.supervised == example.supervised[-alone.n_supervised :]


# As R1's distilled models: what stands before the end of a thought is taken out of a finished turn.
def test_an_answer_that_the_template_would_change_is_unfit_and_not_changed():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ours = chat_tokenizer(template)
    assert ours.decode(ours.example("why?", "Rest.").ids).endswith("Rest.")
    with pytest.raises(Unfit, match="does not write '<think>step"):
        ours.example("why?", "<think>step</think>Rest.")
    with pytest.raises(Unfit, match="which ends a turn"):
        ours.example("why?", "Rest.<|im_end|>More.")
    whole = chat_tokenizer(THINKING_SWITCH).example("why?", "<think>step</think>Rest.")
    assert "step" in chat_tokenizer(THINKING_SWITCH).decode(whole.ids[whole.n_prompt :])  # trained whole


def test_a_tokenizer_that_puts_a_space_before_an_answer_is_refused_at_load():
    """SentencePiece kin: Metaspace prepends ▁ to whatever text it is given."""
    spaced = tokenizers.Tokenizer(models.BPE())
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    texts = [text for chat in CHATS for text in chat] + ["assistant\nuser\nx PROBE-QUESTION PROBE-ANSWER"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=TOKENS, show_progress=False)
    spaced.train_from_iterator(texts, trainer)
    with pytest.raises(UserError, match="SentencePiece"):
        Tokenizer(spaced, CLOSED_BY_IM_END, SPECIAL)
