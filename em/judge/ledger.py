"""What a judge or a writer costs: a forecast, the account, and the cap. Money is finite and never falls.

Prices are lines of `models.json`, each with its date; a model without one has none until `--price` gives it,
and a forecast says so. The account counts the tokens that the API itself reports, at the price of the model
that answers. A call that the API answered without our seeing it (a time-out, a kill) may be billed and not be
in it.
"""

import threading
from dataclasses import dataclass, field

from em.errors import UserError
from em.judge.models import Price, is_money

# Qwen's and Olmo's tokenizers make 4.9 to 5.0 characters a token of the dataset's English; 4.5 leaves room.
CHARACTERS_PER_TOKEN = 4.5


class BudgetReached(UserError):
    """The next call could take the account past the cap."""


@dataclass
class Ledger:
    """The account of one client. Threads may add to it; counts never go down.

    client: the judge, see `em.judge.client`. given: a price that counts instead of the known one. calls:
    answers the API gave. cached: answers that needed no call. failed: calls given up, which the next pass
    asks again.
    """

    client: object
    given: Price | None = None
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
        if self.budget_usd is not None and not is_money(self.budget_usd):
            raise UserError(f"--budget-usd takes dollars, such as 5, not {self.budget_usd!r}")
        self.check()

    def check(self) -> None:
        """UserError for a cap without a price: when the account is opened, and when another model answers."""
        if self.budget_usd is not None and self.price is None:
            raise UserError(
                f"no price is known for {self.client.identity}, so a budget cannot be kept; add "
                f"{self.client.generation.price_option} INPUT,OUTPUT (dollars per million tokens) or leave "
                "--budget-usd out"
            )

    @property
    def price(self) -> Price | None:
        return self.given or self.client.price

    @property
    def usd(self) -> float | None:
        price = self.price
        return price and price.usd(self.prompt_tokens, self.output_tokens)

    def reserve(self, prompt: str) -> float | None:
        """Dollars set aside for a call, at most what it can cost; None where that could pass the cap.

        A tokenizer that falls back on bytes never makes more tokens than there are bytes.
        """
        if self.budget_usd is None:
            return 0.0
        self.check()
        most = self.price.usd(*self._most(prompt))
        with self._lock:
            if self.usd + self._reserved + most > self.budget_usd:
                return None
            self._reserved += most
        return most

    def _most(self, prompt: str) -> tuple[int, int]:
        text = self.client.generation.system + prompt
        return len(text.encode("utf-8", "surrogatepass")) + 32, self.client.most_output

    def settle(
        self, reserved: float, prompt: str, prompt_tokens: int | None, output_tokens: int | None
    ) -> tuple[int, int]:
        """A call was answered: its tokens take the place of what was set aside for it. Returns them.

        Where the server did not say (None), what was set aside counts, so that the cap holds; without a cap,
        what is typical.
        """
        characters = len(self.client.generation.system) + len(prompt)
        typical = round(characters / CHARACTERS_PER_TOKEN), self.client.typical_output
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
        asked = self.client.generation
        bill = _bill(self.price, self.prompt_tokens, self.output_tokens, asked.price_option)
        return f"{asked.role} {self.client.identity}: {counts}; {bill}"


def describe_forecast(forecast: dict, price: Price | None) -> str:
    """`Judge.forecast`'s result as one line."""
    if not forecast["calls"]:
        return (
            f"forecast for {forecast['judge']}: nothing to ask, all {forecast['cached']:,} answers are known"
        )
    return (
        f"forecast for {forecast['judge']}: {forecast['calls']:,} calls for {forecast['rows']:,} rows "
        f"({forecast['cached']:,} answers are cached); "
        f"about {_bill(price, forecast['prompt_tokens'], forecast['output_tokens'])}"
    )


def _bill(price: Price | None, prompt_tokens: int, output_tokens: int, option: str = "--price") -> str:
    tokens = f"{prompt_tokens:,} prompt and {output_tokens:,} output tokens"
    if price is None:
        return f"{tokens}, price unknown ({option} INPUT,OUTPUT sets it)"
    return f"{tokens}, ${price.usd(prompt_tokens, output_tokens):.4f} by {price.origin}"
