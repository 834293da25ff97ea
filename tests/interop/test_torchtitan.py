"""Groups as torchtitan takes them: each parameter matched once, the numbers those of the plan, the text as kept."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import umup
from umup.errors import PlanError
from umup.interop.torchtitan import multipliers_toml, param_groups_python, pattern_groups

GOLDEN = Path(__file__).parent / "golden"
LR, DECAY, EPS = 0.003, 0.1, 1e-6


class Block(nn.Module):
    """Names as torchtitan's Llama has them."""

    def __init__(self, width):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = nn.ModuleDict({n: nn.Linear(width, width, bias=False) for n in ("wq", "wk", "wv", "wo")})
        self.feed_forward = nn.ModuleDict(
            {
                "w1": nn.Linear(width, 3 * width, bias=False),
                "w2": nn.Linear(3 * width, width, bias=False),
                "w3": nn.Linear(width, 3 * width, bias=False),
            }
        )


class Llama(nn.Module):
    """Twelve layers: the pattern must not take 1 for 10."""

    def __init__(self, width):
        super().__init__()
        self.tok_embeddings = nn.Embedding(32, width)
        self.layers = nn.ModuleDict({str(i): Block(width) for i in range(12)})
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, 32, bias=False)


def plan_of(make=Llama, **arguments):
    with torch.device("meta"):
        return umup.plan(make(64), base=make(16), **arguments)


@pytest.fixture(scope="module")
def plan():
    return plan_of()


def assigned(groups, names):
    """As torchtitan does it: re.search; here nothing may match twice."""
    found = {name: [g for g in groups if re.compile(g.pattern).search(name)] for name in names}
    assert {name: len(matches) for name, matches in found.items()} == dict.fromkeys(names, 1)
    return {name: matches[0] for name, matches in found.items()}


def test_each_parameter_is_matched_by_exactly_one_pattern(plan):
    groups = assigned(pattern_groups(plan.folded, LR), plan.folded.stored)
    assert groups["layers.1.attention.wq.weight"] is groups["layers.10.attention.wq.weight"]
    assert len(set(groups.values())) == 4


def test_patterns_match_nothing_else(plan):
    patterns = [re.compile(g.pattern) for g in pattern_groups(plan.folded, LR)]
    for name in ("layers.x.attention.wq.weight", "layers.1.attention.wq.weights", "a.norm.weight", "normXweight"):
        assert not any(p.search(name) for p in patterns)


@pytest.mark.filterwarnings("ignore:weight_decay. independent decay")
@pytest.mark.parametrize("independent", [True, False])
def test_numbers_are_those_of_param_groups(independent):
    plan = plan_of(independent_weight_decay=independent)
    with torch.device("meta"):
        model = Llama(64)
    expected = {name: g for g in plan.param_groups(model, lr=LR, weight_decay=DECAY, eps=EPS) for name in g["names"]}
    for name, g in assigned(pattern_groups(plan.folded, LR), expected).items():
        mine = (LR * g.lr, DECAY * g.weight_decay, EPS * g.eps)
        assert mine == pytest.approx(tuple(expected[name][q] for q in ("lr", "weight_decay", "eps")), rel=1e-12)
    text = param_groups_python(plan.folded, lr=LR, weight_decay=DECAY, eps=EPS)
    calls = ast.parse(f"dict({text})", mode="eval").body.keywords[0].value.elts
    written = [{k.arg: ast.literal_eval(k.value) for k in call.keywords} for call in calls]
    for name, group in expected.items():
        (found,) = [w for w in written if re.search(w["pattern"], name)]
        assert found["optimizer_name"] == "AdamW"
        assert found["optimizer_kwargs"] == pytest.approx({q: group[q] for q in ("lr", "weight_decay", "eps")})


def test_toml_is_read_back(plan):
    tables = tomllib.loads(multipliers_toml(plan.folded, LR))["optimizer"]["param_groups"]
    groups = pattern_groups(plan.folded, LR)
    assert [(t["pattern"], t["lr_multiplier"], t["weight_decay_multiplier"]) for t in tables] == [
        (g.pattern, g.lr, g.weight_decay) for g in groups
    ]


def test_text_is_as_kept(plan):
    assert multipliers_toml(plan.folded, LR) == (GOLDEN / "torchtitan.toml").read_text()
    assert param_groups_python(plan.folded, lr=LR, weight_decay=DECAY) == (GOLDEN / "torchtitan.txt").read_text()


def test_layers_that_disagree_are_named():
    class Uneven(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed = nn.Embedding(32, width)
            self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, 48), nn.Linear(48, width)])
            self.head = nn.Linear(width, 32)

    plan = plan_of(Uneven)
    groups = assigned(pattern_groups(plan.folded, LR), plan.folded.stored)
    assert groups["layers.0.weight"].lr != groups["layers.2.weight"].lr


def test_refusals(plan):
    with pytest.raises(PlanError, match=r"output\.weight has the forward multiplier 0\.25; write plan\.fold\(\)"):
        pattern_groups(plan.plan, LR)
    with pytest.raises(PlanError, match="no groups for optimizer 'muon'"):
        pattern_groups(plan_of(optimizer="muon").folded, LR)
