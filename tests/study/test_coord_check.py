"""The coordinate check: correct networks pass, known mistakes fail and are named, the verdict is arithmetic."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import umup
from umup.errors import ConfigError
from umup.study.coord_check import CoordReport, default_depths, default_widths
from umup.study.coord_subjects import config_subject, sized
from umup.study.coord_suspects import suspects
from umup.study.coord_verdict import Mismatch, Slope, mismatches, slopes
from umup.study.coordinates import Point, Row, Subject, measure

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "coord_check_power.py"


@pytest.fixture(scope="module")
def power():
    return runpy.run_path(str(BENCHMARK))


# --- arithmetic ---


def rows(values, kind="effective", name="layers.0.mlp.up", step=1, expected=None):
    """One row per (width, seed)."""
    return [Row(Point(w, 2, 16, seed), step, name, kind, v, (expected or {}).get(w)) for (w, seed), v in values.items()]


def power_law(exponent, seeds=3, noise=0.0):
    signs = (1, -1, 0)
    return {(w, s): w ** (exponent + noise * signs[s]) for w in (64, 128, 256) for s in range(seeds)}


@pytest.mark.parametrize(
    ("exponent", "noise", "status"),
    [(0.0, 0.0, "pass"), (1.0, 0.0, "fail"), (-0.5, 0.0, "fail"), (0.3, 0.1, "undecided"), (0.1, 0.05, "pass")],
)
def test_slope_and_status(exponent, noise, status):
    (slope,) = slopes("width", rows(power_law(exponent, noise=noise)), {})
    assert slope.slope == pytest.approx(exponent)
    # variance of (e+n, e-n, e) is n^2; t at 2 degrees of freedom is 4.30
    assert slope.high - slope.slope == pytest.approx(4.30 * noise / 3**0.5)
    assert slope.status == status


def test_what_a_plan_scales_is_divided_out():
    expected = {w: 1 / w for w in (64, 128, 256)}
    (slope,) = slopes("width", rows(power_law(-1), "update", "up.weight", expected=expected), {})
    assert slope.slope == pytest.approx(0)
    assert slope.judged


def test_numbers_are_judged_only_against_a_plan():
    (slope,) = slopes("width", rows(power_law(-1), "update", "up.weight"), {})
    assert not slope.judged
    assert slope.status == "pass"


@pytest.mark.parametrize(
    ("kind", "role", "exponent", "status"),
    [
        ("output", "readout", -0.5, "pass"),
        ("output", "readout", 0.5, "fail"),
        ("output", "hidden", -0.5, "fail"),
        ("logits", "", -0.5, "pass"),
        ("logits", "", 0.5, "fail"),
        ("propagating", "hidden", -0.5, "pass"),
        ("ratio", "hidden", 1.0, "pass"),
    ],
)
def test_transients_are_excused_and_growth_is_not(kind, role, exponent, status):
    (slope,) = slopes("width", rows(power_law(exponent), kind, "x"), {"x": role})
    assert slope.status == status


def test_parameters_without_a_gradient_are_left_out():
    found = rows(power_law(1.0), "update", "k.bias")
    found += [r for n, g in (("k.bias", 1e-9), ("q", 1.0), ("v", 1.0)) for r in rows({(64, 0): g}, "gradient", n)]
    assert not [s for s in slopes("width", found, {}) if s.name == "k.bias"]


def test_constants_are_compared_with_the_plan():
    found = [
        Row(Point(64, 2, 16, 0), 0, "up.weight", "lr", 0.5, 0.5),
        Row(Point(64, 2, 16, 0), 0, "up.weight", "eps", 2.0, 1.0),
    ]
    assert mismatches("width", found, {}, False) == [Mismatch("width", "up.weight", "eps", "", 64, 2.0, 1.0)]


def layered(heights, kind, name="layers.{}.attn.out", step=1, seeds=2):
    """Rows over depth: heights(layer, depth) by layer."""
    return [
        Row(Point(64, n, 16, seed), step, name.format(i), kind, heights(i, n))
        for n in (2, 4, 8)
        for seed in range(seeds)
        for i in range(n)
    ]


@pytest.mark.parametrize(("exponent", "status"), [(1.0, "fail"), (0.5, "fail"), (0.0, "pass"), (-1.0, "pass")])
@pytest.mark.parametrize("kind", ["output", "effective", "logits"])
def test_over_depth_a_name_is_the_mean_of_its_layers_and_may_shrink(kind, exponent, status):
    (slope,) = slopes("depth", layered(lambda i, n: n**exponent, kind), {"layers.5.attn.out": "hidden_out"})
    assert (slope.name, slope.role) == ("layers.*.attn.out", "hidden_out")
    assert slope.slope == pytest.approx(exponent)
    assert slope.status == status


def test_over_depth_the_stream_moves_as_far_as_where_it_ends():
    """The first layer's part of it falls with depth, which is no slope."""
    found = slopes("depth", layered(lambda i, n: (i + 1) / n, "change", "layers.{}"), {})
    assert [(s.slope, s.judged) for s in found] == [(pytest.approx(0), True)]
    (inside,) = slopes("depth", layered(lambda i, n: n, "change"), {})
    assert (inside.slope, inside.judged, inside.status) == (pytest.approx(1), False, "pass")


def test_over_depth_only_the_first_update_is_held_against_the_plan():
    """By layer; later updates turn where a layer comes to lie elsewhere in the network."""
    rows = layered(lambda i, n: 1.0, "update", "layers.{}.up.weight")
    rows += layered(lambda i, n: n, "update", "layers.{}.up.weight", step=2)
    found = slopes("depth", [replace(r, expected=1.0) for r in rows], {})
    assert {s.name for s in found} == {f"layers.{i}.up.weight" for i in range(4)}
    assert all(s.slope == pytest.approx(0) and s.judged for s in found)


def test_verdict():
    flat, steep = (Slope("width", "x", "effective", "trained", "hidden", s, s, s) for s in (0.0, 1.0))
    unsure = replace(flat, low=-1.0, high=1.0)
    verdicts = {"PASS": [flat], "UNDECIDED": [flat, unsure], "FAIL": [flat, unsure, steep]}
    for verdict, found in verdicts.items():
        assert CoordReport("mup", "width", (64, 128), 3, 4, tuple(found), (), (), {}, 0.0).verdict == verdict
    wrong = (Mismatch("width", "x", "eps", "", 64, 2.0, 1.0),)
    assert CoordReport("mup", "width", (64, 128), 3, 4, (flat,), wrong, (), {}, 0.0).verdict == "FAIL"


def test_the_first_wrong_layer_is_named_by_coordinates_alone():
    found = [
        Slope("width", "layers.0.up", "output", "trained", "hidden", 0.9, 0.9, 0.9),
        Slope("width", "layers.0.up", "effective", "trained", "hidden", 0.97, 0.97, 0.97),
    ]
    (suspect,) = suspects(found, [], {})
    assert str(suspect) == (
        "hidden LR not divided by width: layers.*.up; effective update of layers.*.up grows as width^0.97"
    )
    assert suspects([replace(found[0], low=0, high=0, slope=0)], [], {}) == []


# --- measuring ---


def test_effective_and_propagating_updates_add_up():
    """A change is the sum of what its own weights do and what its input does; the split is that of the definition."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False))
    first, second = (m.weight.detach().clone() for m in model)
    x = torch.randn(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    subject = Subject(model, optimizer, lambda b: model(b).square().mean(), lambda b: model(b))
    found = {(r.name, r.kind): r.value for r in measure(subject, Point(8, 1, 1, 0), [x], 1) if r.step == 1}
    hidden, start = x @ model[0].weight.T, x @ first.T
    sizes = {
        "effective": hidden @ (model[1].weight - second).T,
        "propagating": (hidden - start) @ second.T,
        "change": hidden @ model[1].weight.T - start @ second.T,
    }
    for kind, value in sizes.items():
        assert found["1", kind] == pytest.approx(float(value.detach().square().mean().sqrt()), rel=1e-4)
    assert found["0", "propagating"] == pytest.approx(0, abs=1e-7)
    assert found["0", "effective"] == pytest.approx(found["0", "change"])


def test_attention_logits_of_shared_keys():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(4, 8), nn.Linear(4, 4)

        def forward(self, x):
            q, k = self.q(x).view(1, 3, 2, 4).transpose(1, 2), self.k(x).view(1, 3, 1, 4).transpose(1, 2)
            self.seen = q @ k.mT * 0.25
            return nn.functional.scaled_dot_product_attention(q, k, k, scale=0.25, enable_gqa=True).sum()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Net()

        def forward(self, x):
            return self.attn(x)

    model, x = Outer(), torch.randn(1, 3, 4)
    subject = Subject(model, torch.optim.SGD(model.parameters(), lr=0.0), model, model)
    found = {(r.name, r.kind, r.step): r.value for r in measure(subject, Point(8, 1, 1, 0), [x], 1)}
    assert found["attn", "logits", 0] == pytest.approx(float(model.attn.seen.detach().square().mean().sqrt()), rel=1e-5)
    assert found["attn", "scale", 0] == 0.25


def test_decay_is_seen_in_the_first_step(power):
    config = power["small_config"]("mup", "llama", optimizer={"weight_decay": 0.1})
    point = Point(64, 2, 16, 0)
    at = sized(config, point)
    found = measure(config_subject(at), point, power["batches_of"](config)(point), 1)
    decays = [r.value for r in found if r.kind == "decay"]
    assert len(decays) == 16  # matrices: gains have none
    assert decays == pytest.approx([0.1] * len(decays), abs=0.02)


# --- whole checks ---


@pytest.mark.parametrize(("scheme", "family"), [("mup", "llama"), ("umup", "gpt2"), ("completep", "gpt2")])
def test_correct_schemes_pass(power, scheme, family):
    report = power["run"](power["small_config"](scheme, family))
    assert report.verdict == "PASS", report.text()
    assert report.suspects == ()


@pytest.mark.parametrize(("scheme", "family"), [("completep", "gpt2"), ("umup", "llama")])
def test_schemes_with_a_rule_of_depth_pass_over_depth(power, scheme, family):
    report = power["run"](power["small_config"](scheme, family), axis="depth")
    assert report.verdict == "PASS", report.text()
    assert report.text().startswith(f"PASS: {scheme} over depths 2, 4, 8 (3 seeds, 3 steps, ")
    assert max(s.high for s in report.slopes if s.judged and s.kind == "effective") < 0.3


def test_the_stream_grows_with_depth_without_a_rule(power):
    """Initial branches fall as 1/sqrt(2 depth), what training adds does not: updates add up to depth^1."""
    report = power["run"](power["small_config"]("mup", "llama"), axis="depth")
    assert report.verdict == "FAIL"
    assert report.suspects[0].mistake.startswith("mup is not depth-independent: it has no rule of depth")
    assert report.suspects[1].mistake == "depth factor of the learning rate missing"
    of = {(s.name, s.kind, s.phase): s.slope for s in report.slopes}
    assert of["layers.*.attn.v", "effective", "trained"] == pytest.approx(1, abs=0.2)
    assert of["layers.*", "output", "start"] == pytest.approx(0, abs=0.1)
    assert of["layers.*", "change", "trained"] > 0.35


def test_a_missing_branch_factor_shows_in_what_the_network_does(power):
    (mistake,) = (
        m
        for m in power["mistakes"]()
        if (m.name, m.scheme, m.family, m.axis) == ("residual depth factor missing", "completep", "gpt2", "depth")
    )
    report = power["run"](power["small_config"]("completep", "gpt2"), mistake)
    assert report.verdict == "FAIL"
    assert report.suspects[0].mistake == "residual depth factor missing"
    alone = power["by_behaviour"](report)[0]
    assert alone.mistake == "residual depth factor missing"
    assert "at step 0 grows as depth^0.5" in alone.evidence
    of = {(s.name, s.kind, s.phase): s.slope for s in report.slopes}
    assert of["layers.*.mlp.up", "effective", "trained"] == pytest.approx(1, abs=0.2)


def test_sp_is_not_width_independent(power):
    report = power["run"](power["small_config"]("sp", "llama"))
    assert report.verdict == "FAIL"
    assert report.suspects[0].mistake.startswith("sp is not width-independent")
    assert report.suspects[1].mistake == "hidden init not scaled with width"


CASES = [
    ("hidden LR not scaled", "mup", "llama"),
    ("one module left in SP", "umup", "llama"),
    ("tied head multiplier missing", "mup", "gpt2"),
    ("attention 1/sqrt(d), growing heads", "umup", "gpt2"),
    ("weight decay not scaled", "mup", "llama"),
    ("residual depth factor missing", "depth_mup", "llama"),
    ("K/V treated like Q (GQA)", "mup", "llama"),
]


@pytest.mark.parametrize(("name", "scheme", "family"), CASES)
def test_mistakes_are_caught_and_named(power, name, scheme, family):
    (mistake,) = (
        m for m in power["mistakes"]() if (m.name, m.scheme, m.family, m.axis) == (name, scheme, family, "width")
    )
    report = power["run"](power["small_config"](scheme, family, **mistake.sections), mistake)
    assert report.verdict == "FAIL"
    assert report.suspects[0].mistake.startswith(mistake.suspect), report.text()


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 32, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(self.up(x).relu())))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


BATCHES = [(torch.arange(16), torch.arange(16).flip(0))]
SIZES = {"widths": [64, 128, 256], "lr": 0.005, "steps": 3, "seeds": 2}


def test_any_module_passes_under_mup():
    report = umup.coord_check(Net, loss_fn, BATCHES, **SIZES)
    assert report.verdict == "PASS", report.text()


def test_any_module_under_sp_fails_and_its_first_wrong_layer_is_named():
    report = umup.coord_check(Net, loss_fn, BATCHES, scheme="sp", **SIZES)
    assert report.verdict == "FAIL"
    assert "sp is not width-independent" in report.text()
    assert [s.mistake for s in report.suspects[1:]] == ["hidden LR not divided by width"]


def test_an_optimizer_of_ones_own_is_judged_by_coordinates():
    def adam(model):
        return torch.optim.Adam(model.parameters(), lr=0.005)

    report = umup.coord_check(Net, loss_fn, BATCHES, make_optimizer=adam, **SIZES)
    assert report.verdict == "FAIL"
    assert report.suspects[0].mistake == "hidden LR not divided by width"
    assert {"up", "down"} & set(report.suspects[0].where)


def test_a_plan_that_is_not_applied_by_the_optimizer_is_not_needed():
    """The user's own plan, applied by the user, passes as it comes."""

    def planned(width):
        model = Net(width)
        plan = umup.plan(model, base=lambda: Net(32), scheme="mup")
        plan.apply(model)
        model.plan = plan
        return model

    def adam(model):
        return torch.optim.AdamW(model.plan.param_groups(model, lr=0.005))

    report = umup.coord_check(planned, loss_fn, BATCHES, make_optimizer=adam, **SIZES)
    assert report.verdict == "PASS", report.text()


class Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.blocks = nn.ModuleList(DeepBlock() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 32, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class DeepBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


DEPTHS = {"depths": [2, 4, 8], "lr": 0.005, "steps": 3, "seeds": 2}


@pytest.mark.parametrize("scheme", ["completep", "depth_mup"])
def test_any_module_passes_over_depth_under_a_scheme_with_a_rule(scheme):
    report = umup.coord_check(Deep, loss_fn, BATCHES, scheme=scheme, **DEPTHS)
    assert report.verdict == "PASS", report.text()


def test_any_module_grows_with_depth_without_one():
    report = umup.coord_check(Deep, loss_fn, BATCHES, scheme="mup", **DEPTHS)
    assert report.verdict == "FAIL", report.text()
    assert report.suspects[0].mistake.startswith("mup is not depth-independent")
    assert next(s.slope for s in report.slopes if (s.name, s.kind) == ("blocks.*", "change")) > 0.35


def test_too_few_sizes_are_refused():
    with pytest.raises(ConfigError, match=r"widths 64, 64, .* write at least 2 widths"):
        umup.coord_check(Net, loss_fn, BATCHES, widths=[64, 64])
    with pytest.raises(ConfigError, match=r"widths none, .* write at least 2 widths"):
        umup.coord_check(Net, loss_fn, BATCHES)
    with pytest.raises(ConfigError, match="write one of them"):
        umup.coord_check(Net, loss_fn, BATCHES, widths=[64, 128], depths=[2, 4])


def test_default_depths(power):
    assert default_depths(power["small_config"]("mup", "llama")) == (2, 4, 8)
    assert default_depths(power["small_config"]("mup", "llama", model={"num_layers": 1})) == (1, 2, 4)


def test_default_widths(power):
    assert default_widths(power["small_config"]("mup", "llama")) == (64, 128, 256)
    assert default_widths(power["small_config"]("mup", "llama", model={"hidden_size": 512})) == (128, 256, 512)
