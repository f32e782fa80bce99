"""When a measured interval agrees with what the paper states: one rule, for worlds and for language.

What is stated is a value, a range, a direction (one bound open), or that a quantity is flat, which is a
margin around zero. Where the paper has words only, whoever states it says how they are read.

    agrees        a value: the interval contains it; a range: our value lies in it; and in both the interval
                  is no wider than ± NARROW. A direction: the whole interval is on its side. Flat: the whole
                  interval is within the margin
    differs       the interval excludes the value, the range, the side, or the margin
    not resolved  anything else: too few worlds or rows to tell
    floor         the value and both bounds are 0 where another value is stated, or a change of any kind:
                  nothing moved in any world, and it cannot be seen whether anything could
    broken        INCOHERENT_FROM % of the answers or more are incoherent: v1 and v2 say little there
    not measured  there is no value

A value without an interval is not resolved: nothing says how far another run would be.
"""

AGREES, DIFFERS, NOT_RESOLVED, NOT_MEASURED = "agrees", "differs", "not resolved", "not measured"
FLOOR, BROKEN = "floor", "broken"
VERDICTS = (AGREES, DIFFERS, NOT_RESOLVED, NOT_MEASURED)
LEVEL = "a level, not judged"  # of a reduced world, or of another model than the paper's
NARROW = {"%": 10.0, "points": 10.0, "ratio": 0.1, "r": 0.1}  # half of the widest interval that can agree
NARROW_NORM = 0.1  # the same for α*, a norm: of the stated value
INCOHERENT_FROM = 20.0  # %


def verdict(stated: dict, ours: dict | None) -> str:
    """By the rule above.

    stated: "low" and "high", None where open, "unit", and "flat" (default: no). ours: "value", and "low" and
    "high" around it, None where there are none; "incoherent", in %, of the answers, where it is to count.
    """
    low, high = stated.get("low"), stated.get("high")
    if ours is None or ours["value"] is None:
        return NOT_MEASURED
    if low is None and high is None:
        return "not stated"
    if ours.get("incoherent", 0.0) >= INCOHERENT_FROM:
        return BROKEN
    if ours["low"] is None:
        return NOT_RESOLVED
    if ours["value"] == ours["low"] == ours["high"] == 0 and not _none_is_stated(stated):
        return FLOOR
    if (low is not None and ours["high"] < low) or (high is not None and ours["low"] > high):
        return DIFFERS
    if stated.get("flat") or low is None or high is None:
        inside = (low is None or ours["low"] >= low) and (high is None or ours["high"] <= high)
        return AGREES if inside else NOT_RESOLVED
    inside = low == high or low <= ours["value"] <= high
    return AGREES if inside and ours["high"] - ours["low"] <= 2 * widest(stated) else NOT_RESOLVED


def _none_is_stated(stated: dict) -> bool:
    """Whether 0 is a rate that is stated, as of incoherence; a change of 0 may be for want of an effect."""
    low, high = stated.get("low"), stated.get("high")
    return stated["unit"] == "%" and (low is None or low <= 0) and (high is None or high >= 0)


def widest(stated: dict) -> float:
    """Half of the widest interval that can agree with a value or a range."""
    return NARROW.get(stated["unit"]) or NARROW_NORM * abs(stated["high"])


def decisive(stated: dict, value: float) -> float:
    """Half of the widest interval around `value` that would be a verdict, agrees or differs."""
    low, high = stated.get("low"), stated.get("high")
    if stated.get("flat") or low is None or high is None:
        return min(abs(value - bound) for bound in (low, high) if bound is not None)
    away = max(low - value, value - high, 0.0)
    return max(away, widest(stated)) if low == high or away == 0 else away
