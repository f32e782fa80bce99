"""What the sheet says of a plan."""

import pytest

from em.errors import UserError
from em.estimate.gpus import CALL, CONTEXT, GPUS, gpu_of
from em.estimate.sheet import HOST, Part, Plan, advice, checked, duration, lines, show
from em.estimate.trace import PRODUCTS, Cost, Work
from em.files import write_json

GPU = GPUS["h100"]


def cost(seconds: float, gigabytes: float = 10.0, calls: float = 0) -> Cost:
    return Cost({PRODUCTS: Work(1, 0, 0, seconds / 2, seconds)}, calls, {"weights": gigabytes * 1e9})


def plan(gigabytes: float = 10.0, **options) -> Plan:
    parts = [Part("load", 1, seconds=5.0), Part("step", 100, cost(0.2, gigabytes))]
    return Plan("a run", GPU, parts, 100, ("step",), **options)


def test_a_run_is_the_sum_of_its_parts_and_peaks_at_the_largest():
    found = show(plan(), say=lambda text: None)
    assert found["run"] == pytest.approx({"lower": 15.0, "likely": 25.0})
    assert found["step"] == pytest.approx({"lower": 0.1, "likely": 0.2})
    assert found["memory"]["peak"] == 10e9 and found["memory"]["needed"] > 10e9 + CONTEXT
    assert found["fits"] and found["knob"] is None
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"][HOST] == pytest.approx(0.2)


def test_eager_code_takes_as_long_as_its_host_and_a_graph_as_its_kernels():
    slow = cost(0.001, calls=0.01 / CALL)
    assert Part("eager", 2, slow).likely == pytest.approx(0.02)
    assert Part("graphed", 2, slow, graphed=True).likely == pytest.approx(0.002)


def test_the_first_knob_that_makes_it_fit_is_named_and_worked_out_no_further():
    def never():
        raise AssertionError("worked out for nothing")

    knobs = [("--a", lambda: plan(90)), ("--b", lambda: plan(60)), ("--c", never)]
    words, knob = advice(plan(100, knobs=knobs))
    assert knob == "--b" and "62.8 GB, fits" in words
    words, knob = advice(plan(100, knobs=knobs[:1]))
    assert knob is None and "--a" in words
    assert advice(plan(60, knobs=[("--c", never)])) == (None, None)


def test_it_says_that_it_is_an_estimate_and_whether_it_fits():
    text = "\n".join(lines(plan(100)))
    assert "an estimate" in text and "does NOT fit" in text and max(map(len, text.splitlines())) <= 130
    assert "fits, " in "\n".join(lines(plan(10)))


def test_what_was_measured_says_how_good_the_estimates_are(tmp_path):
    path = tmp_path / "calibration.json"
    assert "never measured on a card" in checked("h100", path)
    row = {"what": "a step", "estimate": 2.0, "measured": 3.0, "gpu": "h100", "unit": "s"}
    write_json(path, [row, row | {"measured": 1.0}, row | {"estimate": None}])
    assert "2 figures measured on this card" in checked("h100", path) and "0.50 to 1.50" in checked(
        "h100", path
    )
    assert "never on this card" in checked("a100", path)
    write_json(path, [{"what": "a step"}])
    with pytest.raises(UserError, match="calibration.json is no list of rows"):
        checked("h100", path)


def test_every_gpu_reaches_less_than_it_has():
    for gpu in GPUS.values():
        assert gpu.products < gpu.flops and gpu.attention < gpu.flops and gpu.copies < gpu.bandwidth
        assert gpu_of(gpu.name) is gpu
    with pytest.raises(UserError, match="--gpu tpu"):
        gpu_of("tpu")


def test_durations_have_a_unit_that_suits_them():
    assert [duration(s) for s in (2e-4, 0.25, 90, 600, 36_000)] == [
        "0.2 ms",
        "0.25 s",
        "90 s",
        "10 min",
        "10 h",
    ]
