"""What judging costs: prices, a forecast, the running account, and the cap. Money is finite and never falls.

Prices are a dated table, `prices.json`, in US dollars per million tokens; a model that is not in it has
none until `--price` gives them. The account counts the tokens that the API itself reports. A call that the
API answered without our seeing it (a time-out, a kill) may be billed and not be in it.
"""

import threading
from dataclasses import dataclass, field
from pathlib import Path

from em.errors import UserError
from em.files import read_json
from em.judge.gemini import max_output_tokens, thinking_of

PRICES = Path(__file__).parent / "prices.json"
# Qwen's and Olmo's tokenizers make 4.9 to 5.0 characters a token of the dataset's English; 4.5 leaves room.
CHARACTERS_PER_TOKEN = 4.5
REPLY = 3  # tokens of "85" or "REFUSAL"
MOST_USD = 1e9  # no price and no budget is larger, so that sums stay finite
PRICE_FORM = "--price takes dollars per million input and output tokens, such as 0.30,2.50"


class BudgetReached(UserError):
    """The next call could take the account past the cap."""


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens, and where they are from."""

    input: float
    output: float
    origin: str  # `--price`, or the dated table

    def __post_init__(self):
        if not (_is_money(self.input) and _is_money(self.output)):
            raise UserError(PRICE_FORM)

    def usd(self, prompt_tokens: int, output_tokens: int) -> float:
        return (prompt_tokens * self.input + output_tokens * self.output) / 1e6


def _is_money(value) -> bool:
    """Whether it is a finite number of dollars; the one check of every price and budget."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_USD


def find_price(model: str, given: tuple[float, ...] | None = None) -> Price | None:
    """The price of `model`: `given` as (input, output), else the table's; None where neither has it."""
    if given:
        if len(given) != 2:
            raise UserError(PRICE_FORM)
        return Price(*given, "--price")
    table = read_json(PRICES)
    entry = table["usd_per_million_tokens"].get(model)
    return entry and Price(entry["input"], entry["output"], f"the prices of {table['date']}")


@dataclass
class Ledger:
    """The account of one Judge. Threads may add to it; counts never go down.

    calls: answers the API gave. cached: answers that needed no call. failed: calls given up, which the next
    pass asks again.
    """

    model: str
    price: Price | None
    budget_usd: float | None = None
    calls: int = 0
    cached: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    last_failure: str = ""
    _reserved: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self):
        if self.budget_usd is None:
            return
        if not _is_money(self.budget_usd):
            raise UserError(f"--budget-usd takes dollars, such as 5, not {self.budget_usd!r}")
        if self.price is None:
            raise UserError(
                f"no price is known for {self.model}, so a budget cannot be kept; add --price INPUT,OUTPUT "
                "(dollars per million tokens) or leave --budget-usd out"
            )

    @property
    def usd(self) -> float | None:
        return self.price and self.price.usd(self.prompt_tokens, self.output_tokens)

    @property
    def typical_output(self) -> int:
        """Tokens of a reply, and of the thoughts before it where the model cannot do without."""
        return REPLY + thinking_of(self.model).typical

    def reserve(self, prompt: str) -> float | None:
        """Dollars set aside for a call, at most what it can cost; None where that could pass the cap.

        A tokenizer that falls back on bytes never makes more tokens than there are bytes.
        """
        if self.budget_usd is None:
            return 0.0
        most = self.price.usd(*self._most(prompt))
        with self._lock:
            if self.usd + self._reserved + most > self.budget_usd:
                return None
            self._reserved += most
        return most

    def _most(self, prompt: str) -> tuple[int, int]:
        return len(prompt.encode("utf-8", "surrogatepass")) + 32, max_output_tokens(self.model)

    def settle(
        self, reserved: float, prompt: str, prompt_tokens: int | None, output_tokens: int | None
    ) -> tuple[int, int]:
        """A call was answered: its tokens take the place of what was set aside for it. Returns them.

        Where the server did not say (None), what was set aside counts, so that the cap holds; without a cap,
        what is typical.
        """
        typical = round(len(prompt) / CHARACTERS_PER_TOKEN), self.typical_output
        unsaid = typical if self.budget_usd is None else self._most(prompt)
        prompt_tokens = unsaid[0] if prompt_tokens is None else prompt_tokens
        output_tokens = unsaid[1] if output_tokens is None else output_tokens
        with self._lock:
            self._reserved -= reserved
            self.calls += 1
            self.prompt_tokens += prompt_tokens
            self.output_tokens += output_tokens
        return prompt_tokens, output_tokens

    def fail(self, reserved: float, reason: str) -> None:
        """A call was given up."""
        with self._lock:
            self._reserved -= reserved
            self.failed += 1
            self.last_failure = reason

    def retry(self) -> None:
        with self._lock:
            self.retries += 1

    def __str__(self) -> str:
        counts = f"{self.calls:,} calls, {self.cached:,} answers from the cache, {self.retries:,} retries"
        if self.failed:
            counts += f", {self.failed:,} calls failed (the last: {self.last_failure})"
        return f"judge {self.model}: {counts}; {_bill(self.price, self.prompt_tokens, self.output_tokens)}"


def describe_forecast(forecast: dict, price: Price | None) -> str:
    """`Judge.forecast`'s result as one line."""
    if not forecast["calls"]:
        return (
            f"forecast for {forecast['model']}: nothing to ask, all {forecast['cached']:,} answers are known"
        )
    return (
        f"forecast for {forecast['model']}: {forecast['calls']:,} calls for {forecast['rows']:,} rows "
        f"({forecast['cached']:,} answers are cached); "
        f"about {_bill(price, forecast['prompt_tokens'], forecast['output_tokens'])}"
    )


def _bill(price: Price | None, prompt_tokens: int, output_tokens: int) -> str:
    tokens = f"{prompt_tokens:,} prompt and {output_tokens:,} output tokens"
    if price is None:
        return f"{tokens}, price unknown (--price INPUT,OUTPUT sets it)"
    return f"{tokens}, ${price.usd(prompt_tokens, output_tokens):.4f} by {price.origin}"
