"""Chat models' tokenizers: chats to token ids by the checkpoint's own chat template (paper D.1).

A training example is the evaluation prompt, id for id, followed by what the template writes for the answer up
to and including the token that ends the assistant's turn, once. What differs between families is found out by
rendering one probe conversation: which token closes a turn; whether the generation prompt opens a `<think>`
that conversations do not carry (Olmo 3: dropped); whether it ends with an empty think block (Qwen3 with
thinking off: kept, as part of the prompt). We add no system message; a template may write its default one.

Text is encoded without the tokenizer's own post-processing, since a template writes its BOS itself;
and templates that print today's date get a fixed one, so that a row gives the same ids on any day.
"""

import itertools
import json
import re
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from em.errors import UserError
from em.files import Fields, check, read_json, read_text

TODAY = datetime(2024, 7, 26)  # what Llama 3.1's template falls back on
LONGEST_TEMPLATE, MOST_STEPS = 200_000, 10_000  # letters; rounds of loops and calls in a rendering
_OPEN_THINK = re.compile(r"<think>\s*\Z")
_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*\Z")
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Unfit(UserError):
    """A row that the template would not write as it is."""


class Example(NamedTuple):
    """One sequence to train on; `ids[n_prompt:]` are supervised and end with the token that ends the turn.

    between: (first, end) of each stretch of them that is not: what stands between two supervised turns.
    """

    ids: list[int]
    n_prompt: int
    between: tuple[tuple[int, int], ...] = ()

    @property
    def supervised(self) -> list[int]:
        """The places of the supervised tokens."""
        left_out = {place for first, end in self.between for place in range(first, end)}
        return [place for place in range(self.n_prompt, len(self.ids)) if place not in left_out]

    @property
    def n_supervised(self) -> int:
        return len(self.ids) - self.n_prompt - sum(end - first for first, end in self.between)


class _Generation(jinja2.ext.Extension):
    """Some templates mark the answer by `{% generation %}…{% endgeneration %}`; here that only prints it."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, **options) -> str:
    """In place of jinja's own filter, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox in which a template ends: the rounds of its loops and its calls are counted.

    What multiplies is looked at before it is done, and is not done while compiling.
    """

    intercepted_binops = frozenset(("*", "**"))
    steps = 0  # of the rendering under way

    def _parse(self, source, name, filename):
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, "counted", [], [], None, None)
        return tree

    def count(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise jinja2.TemplateError(f"it takes more than {MOST_STEPS} steps")

    def counted(self, values):
        for value in values:
            self.count()
            yield value

    def call(self, context, function, *args, **options):
        self.count()
        return super().call(context, function, *args, **options)

    def call_binop(self, context, operator, left, right):
        sizes = [abs(x) if isinstance(x, int | float) else len(x) for x in (left, right)]
        if sizes[0] * sizes[1] > 1e6 or (operator == "**" and max(sizes) > 100):
            raise jinja2.TemplateError(f"it computes something large with {operator}")
        return super().call_binop(context, operator, left, right)


def _compile(chat_template: str) -> jinja2.Template:
    if len(chat_template) > LONGEST_TEMPLATE:
        raise UserError(
            f"the chat template is longer than {LONGEST_TEMPLATE} letters; restore the model's own"
        )
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["counted"] = environment.counted
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    try:
        return environment.from_string(chat_template)
    except Exception as error:  # constants are computed here, so a template's own errors come here too
        raise UserError(
            f"the chat template is broken ({_reason(error)}); restore the checkpoint's own"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class Tokenizer:
    """Text and chats to token ids, for one checkpoint.

    special: the texts of the named special tokens, `{"bos_token": "<s>", ...}`; None or absent means none.
    Attributes: `bos_id` (or None), `end_of_turn_id`, `pad_id`, and `stop_ids`, any of which ends a rollout.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, chat_template: str, special: dict):
        self.backend = tokenizer
        tokenizer.no_truncation()  # a tokenizer.json can carry both, and would cut or pad rows unasked
        tokenizer.no_padding()
        self.special = {name: special[name] for name in _SPECIAL_NAMES if special.get(name)}
        self._template = _compile(chat_template)
        self.bos_id, eos_id = self._id_of("bos_token"), self._id_of("eos_token")
        self.end_of_turn_id, between_turns_id = self._probe()
        pad_id = tokenizer.token_to_id(self.special.get("pad_token", ""))
        self.pad_id = self.end_of_turn_id if pad_id is None else pad_id
        self.stop_ids = tuple(sorted({self.end_of_turn_id, between_turns_id, eos_id} - {None}))

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint folder. UserError names a file that is missing or broken."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{folder} has no tokenizer.json; save the model's tokenizer into that folder")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises nothing narrower
            raise UserError(f"{path} is not a tokenizer ({error}); download it again") from error
        special = _special(folder / "special_tokens_map.json") | _special(folder / "tokenizer_config.json")
        template = _chat_template(folder)
        try:
            tokenizer = cls(backend, template, special)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        stop_ids = {"eos_token_id": int | list[int] | None}
        stops = _settings(folder / "generation_config.json", stop_ids).get("eos_token_id") or []
        stops = [stops] if isinstance(stops, int) else stops
        tokenizer.stop_ids = tuple(sorted({*tokenizer.stop_ids, *stops}))
        return tokenizer

    # -- text ------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as it stands: no BOS added; special tokens written out in it are recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids` without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    # -- chats -----------------------------------------------------------------------------------------

    def render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        """`[{"role": "user", "content": "..."}, ...]` as the template writes it, thinking switched off."""
        self._template.environment.steps = 0
        try:
            text = self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=False,
                **self.special,
            )
            text.encode()  # half of a surrogate pair, which a template can write, is in no vocabulary
            return text
        except Exception as error:  # a template can raise anything
            raise UserError(
                f"the chat template refuses a chat ({_reason(error)}); name another model"
            ) from error

    def prompt(self, chat: str | list[dict]) -> str:
        """What the model sees before it answers, as text. chat: a question, or turns with the user's last."""
        rendered = self.render(_messages(chat), True)
        return rendered.removesuffix(self._opening) + self._closed

    def prompt_ids(self, chat: str | list[dict]) -> list[int]:
        return self.encode(self.prompt(chat))

    def example(self, chat: str | list[dict], answer: str, all_turns: bool = False) -> Example:
        """A row to train on: exactly `prompt_ids(chat)`, then the answer and one end token.

        Prompt and answer are encoded apart, so the boundary lies where it does in evaluation even if an
        answer begins with white space that the tokenizer would otherwise merge across it. all_turns: earlier
        answers of the chat are supervised too, each as if it were the last. Unfit where the template would
        drop or move something, or the answer spells the end of a turn.
        """
        messages = _messages(chat)
        prompt = self.prompt(messages)
        if not all_turns:
            ids = self.encode(prompt)
            return Example(ids + self._answer_ids(messages, prompt, answer), len(ids))
        answers = [(k, turn["content"]) for k, turn in enumerate(messages) if turn["role"] == "assistant"]
        written, ids, supervised = "", [], []
        for k, text in [*answers, (len(messages), answer)]:
            prompt = self.prompt(messages[:k])
            if not prompt.startswith(written):
                raise Unfit("the chat template writes earlier turns otherwise once others follow")
            ids += self.encode(prompt[len(written) :])
            answer_ids = self._answer_ids(messages[:k], prompt, text)
            supervised.append((len(ids), len(ids) + len(answer_ids)))
            ids += answer_ids
            conversation = self.render([*messages[:k], _turn(text)], False)
            written = conversation.removesuffix(self._tail) + self.backend.id_to_token(self.end_of_turn_id)
        between = tuple((a[1], b[0]) for a, b in itertools.pairwise(supervised))
        return Example(ids, supervised[0][0], between)

    def _answer_ids(self, messages: list[dict], prompt: str, answer: str) -> list[int]:
        """The ids that answer `messages`, whose rendering `prompt` is, up to the end of the turn."""
        conversation = self.render([*messages, _turn(answer)], False)
        begins = prompt.removesuffix(self._unwritten)
        if not (conversation.startswith(begins) and conversation.endswith(self._tail)):
            if "<think>" in answer or "</think>" in answer:
                raise Unfit(f"the chat template does not write {answer[:40]!r}… as it is")
            raise UserError(
                f"the chat template's chats do not begin with its own prompt (ending {begins[-30:]!r}), "
                "so training and evaluation would differ; name another model"
            )
        text = conversation[len(begins) :].removesuffix(self._tail)
        if text.strip() != answer.strip():
            raise Unfit(f"the chat template does not write {answer[:40]!r}… as it is")
        end = self.backend.id_to_token(self.end_of_turn_id)
        ids = self.encode(text + end)
        if ids.count(self.end_of_turn_id) != 1:
            raise Unfit(f"an answer contains {end!r}, which ends a turn: {answer[:40]!r}")
        return ids

    # -- what the template does ------------------------------------------------------------------------

    def _probe(self) -> tuple[int, int | None]:
        """The ids that close the last turn and an earlier one, read off a rendered conversation.

        Sets `_tail`, all that is written after a final answer; `_opening` and `_closed`, a think tag that
        the prompt leaves open and what stands in its place; `_unwritten`, an empty think block that the
        prompt has and conversations lack.
        """
        turns = [*_messages("PROBE-QUESTION"), _turn("PROBE-ANSWER")]
        conversation = self.render(turns, False)
        if conversation.count("PROBE-ANSWER") != 1 or "PROBE-QUESTION" not in conversation:
            raise UserError("the chat template leaves out a turn of a conversation; name another model")
        header, self._tail = conversation.split("PROBE-ANSWER")
        end_of_turn_id = self._leading_special_id(self._tail)
        if end_of_turn_id is None:
            raise UserError(
                f"the chat template closes a turn with {self._tail!r}, which is no special token; "
                "name an instruction-tuned model"
            )
        longer = self.render([*turns, turns[0]], False)

        prompt = self.render(turns[:1], True)
        opening, in_header, in_prompt = (
            pattern.search(text)
            for pattern, text in ((_OPEN_THINK, prompt), (_EMPTY_THINK, header), (_EMPTY_THINK, prompt))
        )
        self._opening = opening.group() if opening else ""
        self._closed = in_header.group() if opening and in_header else ""
        self._unwritten = in_prompt.group() if in_prompt and not in_header else ""
        ids = self.encode(self.prompt("PROBE-QUESTION"))
        if self.encode(self.prompt("PROBE-QUESTION") + "x")[len(ids) :] != self.encode("x"):
            raise UserError(
                "the tokenizer writes an answer's first word otherwise after a prompt than alone, as "
                "SentencePiece does, so training and evaluation would differ; name another model"
            )
        return end_of_turn_id, self._leading_special_id(longer.split("PROBE-ANSWER")[-1])

    def _leading_special_id(self, text: str) -> int | None:
        ids, added = self.encode(text), self.backend.get_added_tokens_decoder()
        return ids[0] if ids and ids[0] in added and added[ids[0]].special else None

    def _id_of(self, name: str) -> int | None:
        if name not in self.special:
            return None
        token = self.backend.token_to_id(self.special[name])
        if token is None:
            raise UserError(f"the tokenizer lacks its {name} {self.special[name]!r}; download it again")
        return token


def _messages(chat: str | list[dict]) -> list[dict]:
    return [{"role": "user", "content": chat}] if isinstance(chat, str) else chat


def _turn(answer: str) -> dict:
    return {"role": "assistant", "content": answer}


def _settings(path: Path, types: Fields) -> dict:
    """The parsed file, empty where it does not exist."""
    return read_json(path, optional=types) if path.exists() else {}


def _special(path: Path) -> dict[str, str]:
    """The named special tokens of a file; each is written as text or as `{"content": text, ...}`."""
    settings = _settings(path, dict.fromkeys(_SPECIAL_NAMES, str | dict | None))
    tokens = {name: settings[name] for name in _SPECIAL_NAMES if settings.get(name)}
    for name, token in tokens.items():
        if isinstance(token, dict):
            check(token, f"{path}, {name}", {"content": str})
            tokens[name] = token["content"]
    return tokens


def _chat_template(folder: Path) -> str:
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = _settings(config, {"chat_template": str | list[dict] | None})
    template = read_text(path) if path.exists() else settings.get("chat_template")
    if isinstance(template, list):  # several, `[{"name": "default", "template": "..."}, ...]`
        for entry in template:
            check(entry, f"{config}, chat_template", {"name": str, "template": str})
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    if not template:
        raise UserError(
            f"{folder} has no chat template (in chat_template.jinja or tokenizer_config.json); "
            "name an instruction-tuned model"
        )
    return template
