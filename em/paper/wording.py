"""Numbers of the page as text, and its images as text too."""

import base64
import io
from pathlib import Path

from PIL import Image

from em.errors import UserError

WIDEST = 1200  # pixels of an image on the page
_SIGN = {"%": " %", "points": " points", "nats": " nats"}  # the others are numbers alone


def number(value: float, unit: str) -> str:
    """`6.7`, points and margins with their sign, ratios and correlations with two places."""
    places = {"%": ".1f", "points": "+.1f", "nats": "+.2f"}.get(unit, ".2f")
    return f"{value:{places}}".replace("-", "−")


def number_text(value: dict, unit: str) -> str:
    """`6.7 % [5.1, 8.4]`; where a share counts rows, `8 of 12: 66.7 % [39.1, 86.2]`."""
    if value["value"] is None:
        return "n/a"
    text = f"{value['of']}: " if value.get("of") else ""
    text += number(value["value"], unit) + _SIGN.get(unit, "")
    if value["low"] is not None:
        text += f" [{number(value['low'], unit)}, {number(value['high'], unit)}]"
    return text


def stated_text(stated: dict) -> str:
    """The stated figure: a value, a range, a side, or words."""
    if "text" in stated:
        return stated["text"]
    if "value" in stated:
        return f"{stated['value']:g}"
    low, high, unit = stated["low"], stated["high"], stated["unit"]
    sign = _SIGN.get(unit, "")
    if low is None and high is None:
        return "no value in the text"
    if high is None or (unit == "%" and high == 100):
        text = f"{'>' if low == 0 else '≥'} {low:g}"
    elif low is None or (unit == "%" and low == 0 < high):
        text = f"≤ {high:g}"
    elif low == high:
        text = f"{low:g}"
    else:
        text = f"±{high:g}" if low == -high else f"{low:g} … {high:g}"
    return text.replace("-", "−") + sign


def image_uri(path: Path) -> str:
    """A PNG file as a data URI: no wider than WIDEST, 64 colours, which is enough for charts."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} is no image that can be read ({error}); write it again") from error
    if picture.width > WIDEST:
        size = WIDEST, round(picture.height * WIDEST / picture.width)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture = picture.quantize(64, Image.Quantize.FASTOCTREE)
    picture.putpalette([255 if level > 247 else level for level in picture.getpalette()])  # white stays white
    picture.save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
