"""Tables as `evaluate.py compare` writes them, of planted values; the fields of a file of counts."""

FIELDS = "model train set domain task em_surface rows scored em incoherent refusal other_unscored".split()


def part(values, half=1.0, unit="percent", model="Qwen/Qwen3-14B", **more):
    """A table: {condition: {column: mean}}; every interval ± half."""
    entries = [
        {"condition": condition, "column": column, "pairs_mean": value, "pooled": value, "rows": 400,
         "scored": 400, "prompts": 400, "pairs": 1, "low": value - half, "high": value + half}
        for condition, row in values.items()
        for column, value in row.items()
    ]  # fmt: skip
    columns = list(next(iter(values.values())))
    about = {"conditions": list(values), "columns": columns, "unit": unit, "model": model, "judge": "j"}
    return about | {"entries": entries} | more


def level(values, **more):
    """A table of one column, `all`."""
    return part({name: {"all": value} for name, value in values.items()}, **more)
