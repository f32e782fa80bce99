"""What is known of judges' models, from the one file `models.json`: prices, how to ask, what is a version."""

import fnmatch
import functools
import re
from dataclasses import dataclass
from pathlib import Path

from em.errors import UserError
from em.files import read_json

MODELS = Path(__file__).parent / "models.json"
MOST_USD = 1e9  # no price and no budget is larger, so that sums stay finite
PRICE_FORM = "{} takes dollars per million input and output tokens, such as 0.30,2.50"
# What follows a model's name in those of its versions: -001, -2024-08-06, -20250514, -05-2026.
_VERSION = r"(-\d{3,}|-\d{4}-\d\d-\d\d|-\d\d-\d{4})?(:latest)?"


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens, and where they are from."""

    input: float
    output: float
    origin: str  # the option, or a dated line of the table

    def __post_init__(self):
        if not (is_money(self.input) and is_money(self.output)):
            raise UserError(PRICE_FORM.format(self.origin))

    def usd(self, prompt_tokens: int, output_tokens: int) -> float:
        return (prompt_tokens * self.input + output_tokens * self.output) / 1e6


def is_money(value) -> bool:
    """Whether it is a finite number of dollars; the one check of every price and budget."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_USD


def given_price(values: tuple[float, ...] | None, option: str = "--price") -> Price | None:
    """The price that `option` gives as (input, output); None without one."""
    if not values:
        return None
    if len(values) != 2:
        raise UserError(PRICE_FORM.format(option))
    return Price(*values, option)


@functools.cache
def _lines() -> list[dict]:
    return read_json(MODELS)["models"]


def known(api: str, model: str) -> dict:
    """What the table says of a model: some of input, output, thinking, temperature, limit, date, source."""
    lines = [line for line in _lines() if line["api"] == api]
    named = [line for line in lines if "model" in line and is_version(model, line["model"])]
    family = [line for line in lines if "pattern" in line and fnmatch.fnmatch(model, line["pattern"])]
    return (family[0] if family else {}) | (named[0] if named else {})


def known_price(api: str, model: str) -> Price | None:
    entry = known(api, model)
    return (
        Price(entry["input"], entry["output"], f"the price of {entry['date']}") if "input" in entry else None
    )


def is_version(answered: str, asked: str) -> bool:
    """Whether the model `answered` is what `asked` names: itself, a dated or numbered version, or what an
    alias that ends in -latest stands for. A maker's name before a slash need not be in both.

    gpt-4o-2024-08-06 is a version of gpt-4o; gpt-4o-mini, gemini-2.5-flash-lite and previews are other
    models.
    """
    answered, asked = answered.casefold(), asked.casefold()
    answered, asked = (re.sub(":(free|nitro|floor)$", "", name) for name in (answered, asked))  # a router's
    if "/" not in answered or "/" not in asked:
        answered, asked = answered.split("/")[-1], asked.split("/")[-1]
    if asked.endswith("-latest"):
        return answered.split("-")[0] == asked.split("-")[0]
    return re.fullmatch(re.escape(asked) + _VERSION, answered) is not None
