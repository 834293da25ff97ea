"""From records of ranges to what to spare."""

import json

import pytest

from umup.config.load import dump_yaml, parse_config, read_yaml
from umup.errors import CheckpointError
from umup.models.specs import plan_for, products_for
from umup.study.ranges import MANY_MOVES, Look, RangeReport, collapse, histories_of, linears, read_report

QUIET = {"rms": 1.0, "max": 4.0, "nonfinite": 0, "clip": 0.0, "flush": 0.0, "event": None}


def looks(product, operand="x", exponents=(0, 0, 0), last=None):
    """One look per exponent, ten steps apart; `last` changes entries of the last one."""
    form = "E5M2" if operand == "g" else "E4M3"
    rows = [
        {"step": 10 * i, "product": product, "operand": operand, "format": form, "exponent": e, **QUIET}
        for i, e in enumerate(exponents)
    ]
    rows[-1].update(last or {})
    return [Look(**row) for row in rows]


def report(*groups, overrides=(), adapt=True):
    return RangeReport(histories_of([look for g in groups for look in g], adapt), dict(overrides), "bf16")


UP, DOWN = "layers.{}.mlp.gate+up", "layers.{}.mlp.down"
UNSERVED = {"event": "bf16"}
WANDERING = tuple(range(MANY_MOVES + 2))


def test_a_quiet_run_has_nothing_to_spare():
    steady = report(looks(UP.format(0)), looks(UP.format(0), "g"), looks(UP.format(0), "w", WANDERING, {"clip": 0.5}))
    assert (steady.faults, steady.spare) == ({}, {})


@pytest.mark.parametrize("operand", ["x", "g"])
@pytest.mark.parametrize(
    ("exponents", "last", "reason"),
    [
        ((0, 0, 0), UNSERVED, "no constant served its {} at step 20"),
        (WANDERING, None, f"the scale of its {{}} moved {MANY_MOVES + 1} times"),
        ((0, 0), {"clip": 2.0**-19}, "1.9e-06 of its {} clipped at the last look"),
    ],
    ids=["unserved", "wandering", "clipping"],
)
def test_each_reason_to_spare(operand, exponents, last, reason):
    found = report(looks("head", operand, exponents, last))
    assert found.faults == {"head": reason.format("input" if operand == "x" else "output gradient")}
    assert found.spare == {"head": "bf16"}


@pytest.mark.parametrize(
    ("exponents", "last"), [(WANDERING[:-1], None), ((0, 0), {"clip": 2.0**-20}), ((0, 0), {"event": "2^0 -> 2^4"})]
)
def test_what_is_just_not_enough(exponents, last):
    assert report(looks("head", "x", exponents, last)).faults == {}


def test_clipping_that_ended_is_forgiven():
    first = looks("head", "x", (0,), {"clip": 0.5})
    assert report([*first, *looks("head", "x", (0, -4))[1:]]).faults == {}


def test_what_a_spared_product_would_have_clipped_counts_no_more():
    spared = [*looks("head", "x", (0,), UNSERVED), *looks("head", "x", (0, 0), {"clip": 0.5})[1:]]
    other = looks("head", "g", (0, 0), {"clip": 0.5})
    for adapt, used in ((True, 1), (False, 2)):
        found = report(spared, other, adapt=adapt)
        assert [len(h.used) for h in found.histories] == [used, used]
        assert [row["clip"] for row in found.json()["tensors"]] == ([0.0, 0.0] if adapt else [0.5, 0.5])


def test_all_layers_are_one_pattern_and_some_are_named():
    some = report(*(looks(UP.format(i), last=UNSERVED if i else None) for i in range(3)))
    names = [f"layers.{i}.mlp.{part}" for i in (1, 2) for part in ("gate", "up")]
    assert some.spare == dict.fromkeys(names, "bf16")
    everywhere = report(*(looks(UP.format(i), last=UNSERVED) for i in range(3)), looks(DOWN.format(0)))
    assert everywhere.spare == {"layers.*.mlp.gate": "bf16", "layers.*.mlp.up": "bf16"}


def test_the_runs_own_overrides_stay_and_come_first():
    own = {"layers.0.mlp.down": "fp8", "layers.*": "fp8_e4m3"}  # the later wins: the advice must come last
    found = report(looks(DOWN.format(0), last=UNSERVED), looks(DOWN.format(1)), overrides=own)
    assert list(found.spare.items()) == [("layers.*", "fp8_e4m3"), ("layers.0.mlp.down", "bf16")]


def test_names_of_linears():
    assert linears("layers.3.attn.q+k+v") == ["layers.3.attn.q", "layers.3.attn.k", "layers.3.attn.v"]
    assert linears("head") == ["head"]


def test_alike_layers_are_one_row():
    differing = {3: (0, -2, -2), 7: (0, -2, -2), 8: (0, -2, -2), 5: (0, 3, 3)}
    found = report(*(looks(UP.format(i), "x", differing.get(i, (0, 0, 0))) for i in range(10)), looks("head"))
    rows = [(name, [h.first.product for h in group]) for name, group in collapse(found.histories)]
    assert [name for name, _ in rows] == [
        "layers.{0-2,4,6,9}.mlp.gate+up",
        "layers.{3,7-8}.mlp.gate+up",
        "layers.5.mlp.gate+up",
        "head",
    ]
    assert sum(len(group) for _, group in rows) == 11
    (row,) = collapse(report(*(looks(UP.format(i)) for i in range(10))).histories)
    assert row[0] == "layers.*.mlp.gate+up"


def test_moves_are_where_the_scale_changed():
    (history,) = report(looks("head", "x", (0, 0, 3, 3, 1))).histories
    assert [(a.step, a.exponent, b.exponent) for a, b in history.moves] == [(10, 0, 3), (30, 3, 1)]


@pytest.fixture
def run(tmp_path):
    """A run directory whose only fault is mlp.down's input in both layers."""
    config = parse_config(
        {
            "model": {"hidden_size": 32, "num_layers": 2, "head_dim": 16},
            "precision": {"recipe": "fp8", "overrides": {"*.attn.out": "bf16"}},
        }
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    rows = [look for i in range(2) for look in looks(DOWN.format(i), "x", (0, 0), UNSERVED)]
    (tmp_path / "ranges.jsonl").write_text("".join(json.dumps(row.__dict__) + "\n" for row in rows))
    return tmp_path


def test_a_run_is_read_and_its_advice_can_be_pasted(run):
    found = read_report(run)
    assert found.spare == {"*.attn.out": "bf16", "layers.*.mlp.down": "bf16"}
    body = read_yaml((run / "config.yaml").read_text())
    config = parse_config({**body, "precision": {**body["precision"], "overrides": found.spare}})
    low = {p.name for p in products_for(config, plan_for(config)).values() if p.forward}
    assert low == {f"layers.{i}.{n}" for i in (0, 1) for n in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")}


def test_a_torn_last_line_is_dropped_and_a_damaged_one_named(run):
    path = run / "ranges.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 20, "prod')
    assert [len(h.looks) for h in read_report(run).histories] == [2, 2]
    lines = whole.splitlines()
    for damaged in (lines[2][:30], "[1, 2]", '{"step": 3}', ""):
        path.write_text("\n".join([*lines[:2], damaged, lines[3], ""]))
        with pytest.raises(CheckpointError, match=r"ranges\.jsonl, line 3: not a record of ranges") as caught:
            read_report(run)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", '{"step": 0'])
def test_a_run_without_records_says_how_to_get_them(run, content):
    (run / "ranges.jsonl").unlink()
    if content is not None:
        (run / "ranges.jsonl").write_text(content)
    with pytest.raises(CheckpointError, match=r"precision\.recipe: fp8 .* precision\.scales: monitor or adapt"):
        read_report(run)
