"""A plan's multipliers as factors on weights, so that a network without any computes the same logits. No torch.

Every number of a plan that acts in the forward pass goes into a matrix next to it, whose product is linear:

    parameter multipliers         their own weight
    q.k by `logits`               q, as far as the network's own 1/sqrt(head_dim) does not do it
    attention's `output`          v
    gated act(mult g) u / mult    mult into gate, output/mult into up
    act(mult x) / mult            mult into up, output/mult into down
    branch weights, dropout       attention-out and down
    embedding's sum, dropout      the tables, or the norm after them
    the loss's multiplier         the head

Skip weights need no weight. The stream x_{b+1} = skip_b x_b + branch_b f_b(norm(x_b)) is read by norms only, which do
not see its scale: y_b = x_b / S_b, S_b = skip_0 ... skip_{b-1}, obeys y_{b+1} = y_b + branch_b/S_{b+1} f_b(norm(y_b)).

What norms do see is epsilon, relative to the stream's mean square m: on y_b they should have epsilon/S_b^2, and the
format has one number for all. The stream's overall scale does not help, as it moves them all alike. The number taken
puts the first and the last norm off by as much, one up and one down: a factor of 1 +- `epsilon_error` where m is 1
(under u-muP its start; less where the stream has grown). u-muP's S^2 falls from 1 to 1/3 over any depth, so that an
epsilon of 1e-5 costs at most 2.5e-6 a norm, of which `corrected` gains take back what is the same for all tokens. Where
all skips are 1 it is exact.

A network may keep some of the numbers in its config (Granite: `kept`). Not covered: norms of the stream
(post) or of outputs (res_post), which none of the formats has.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose, sqrt
from statistics import fmean

from umup.models.specs import Shape
from umup.rules.opscales import Value
from umup.rules.plan import USE_QUANTITIES, ParamPlan, Plan
from umup.rules.roles import OpKind

RESIDUALS = (OpKind.RESIDUAL_ATTN, OpKind.RESIDUAL_MLP)


@dataclass(frozen=True)
class Fold:
    """`factors`: parameter -> what to multiply it by (the head's own, tied or not).

    `norm_eps` is the one that is written, `epsilons` what it is for each norm of the stream in the stream's old scale,
    `epsilon_error` the most that it is off by (see the module).
    """

    factors: Mapping[str, float]
    norm_eps: float
    epsilons: Mapping[str, float]
    epsilon_error: float

    @property
    def unties(self) -> bool:
        """Whether the head needs a matrix other than the embedding."""
        return not isclose(self.factors["head.weight"], self.factors["embed.weight"], rel_tol=1e-12)

    def corrected(self, squares: Mapping[str, Sequence[float]], norm_eps: float) -> "Fold":
        """With gains that make up for the epsilons at the mean squares seen, norm -> one for each token.

        A norm should give x/sqrt(m + norm_eps) and gives x/sqrt(m + epsilon): the gain is their mean ratio.
        """
        gains = {
            f"{name}.weight": fmean(sqrt((m + self.epsilons[name]) / (m + norm_eps)) for m in seen)
            for name, seen in squares.items()
        }
        return replace(self, factors={**self.factors, **{n: self.factors.get(n, 1.0) * g for n, g in gains.items()}})


def kept(plan: Plan, shape: Shape) -> dict[str, float]:
    """The numbers that Granite's config has fields for; `residual` is 1 where branches differ."""
    stream = _Stream(plan, shape)
    branches = [stream.branch(i, name) for i in range(shape.num_layers) for name in ("attn", "mlp")]
    one = all(isclose(b, branches[0], rel_tol=1e-12) for b in branches)
    return {
        "embedding": stream.embedding("embed.weight"),
        "attention": plan.ops["layers.0.attn.sdpa"]["logits"],
        "residual": branches[0] if one else 1.0,
        "logits": 1 / (plan.params["head.weight"]["multiplier"] * plan.ops["loss"]["logits"]),
    }


def fold(plan: Plan, shape: Shape, keeps: Mapping[str, float]) -> Fold:
    """The factors for a network that itself has the multipliers `keeps` (its 1/sqrt(head_dim) among them)."""
    stream = _Stream(plan, shape)
    factors = {name: p["multiplier"] for name, p in plan.params.items()}

    def scale(names: Iterable[str], factor: float) -> None:
        factors.update({name: factors[name] * factor for name in names if name in factors})

    for i in range(shape.num_layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        sdpa, act = plan.ops[f"{attn}.sdpa"], plan.ops[f"{mlp}.act"].values
        mult = act["mult"].number if "mult" in act else 1.0
        output = act["output"].number / mult
        scale(_both(f"{attn}.q"), sdpa["logits"] / keeps["attention"])
        scale(_both(f"{attn}.v"), sdpa["output"])
        scale(_both(f"{mlp}.gate" if shape.gated else f"{mlp}.up"), mult)
        if shape.gated:
            scale(_both(f"{mlp}.up"), output)
        else:
            scale([f"{mlp}.down.weight"], output)
        scale(_both(f"{attn}.out"), stream.branch(i, "attn") / keeps["residual"])
        scale(_both(f"{mlp}.down"), stream.branch(i, "mlp") / keeps["residual"])
    scale(_both("head"), plan.ops["loss"]["logits"] * keeps["logits"])
    eps = stream.norm_eps
    tables = stream.embedding("embed.weight") / factors["embed.weight"] / keeps["embedding"]
    if shape.traits.embedding_norm:
        scale(_both("embed_norm"), stream.dropout("embed"))
        tables *= sqrt(eps / shape.norm_eps)  # the norm after them sees their scale through epsilon alone
    scale(["embed.weight", "positions.weight"], tables)
    exact = {name: 1.0 if isclose(f, 1.0, rel_tol=1e-12) else f for name, f in factors.items()}
    epsilons = {name: eps * square for name, square in stream.squares.items()}
    return Fold(exact, eps, epsilons, max(abs(e - shape.norm_eps) for e in epsilons.values()) / 2)


def with_multipliers(plan: Plan, numbers: Mapping[str, float]) -> Plan:
    """The plan of a network whose config says these multipliers, by the names of `kept`; gradients are exact."""

    def used(p: ParamPlan, number: float, rule: str) -> ParamPlan:
        return replace(p, values={**p.values, **dict.fromkeys(USE_QUANTITIES, Value(number, rule, "config.json"))})

    if not numbers:
        return plan
    params, ops = dict(plan.params), dict(plan.ops)
    params["embed.weight"] = used(params["embed.weight"], numbers["embedding"], "embedding multiplier")
    params["head.weight"] = used(params["head.weight"], 1 / numbers["logits"], "1/logits scaling")
    for name, op in ops.items():
        if op.site.kind is OpKind.SDPA:
            attention = Value(numbers["attention"], "attention multiplier", "config.json")
            ops[name] = replace(op, values={**op.values, "logits": attention})
        elif op.site.kind in RESIDUALS:
            branch = Value(numbers["residual"], "residual multiplier", "config.json")
            ops[name] = replace(op, values={**op.values, "branch": branch, "branch_grad": branch})
    return replace(plan, params=params, ops=ops)


def _both(linear: str) -> tuple[str, str]:
    return f"{linear}.weight", f"{linear}.bias"


class _Stream:
    """The residual stream's scale along the network."""

    def __init__(self, plan: Plan, shape: Shape) -> None:
        self.plan, self.shape = plan, shape
        self.after: dict[str, float] = {}  # product of the skips, from each branch's sum on
        scale = 1.0
        for i in range(shape.num_layers):
            for branch in ("attn", "mlp"):
                scale *= plan.ops[f"layers.{i}.{branch}.residual"]["skip"]
                self.after[f"layers.{i}.{branch}"] = scale

    def branch(self, layer: int, name: str) -> float:
        """The factor on a branch's output as it joins the rescaled stream."""
        site = f"layers.{layer}.{name}"
        return self.plan.ops[f"{site}.residual"]["branch"] * self.dropout(site) / self.after[site]

    def dropout(self, owner: str) -> float:
        """The factor that stays of a dropout at inference."""
        return self.plan.ops[f"{owner}.dropout"]["output"] if self.shape.dropout else 1.0

    def embedding(self, table: str) -> float:
        """The factor on a row of the table as it begins the stream, or as it enters the norm after the tables."""
        add = self.plan.ops["embed.add"]["output"] if "embed.add" in self.plan.ops else 1.0
        after = 1.0 if self.shape.traits.embedding_norm else self.dropout("embed")
        return self.plan.params[table]["multiplier"] * add * after

    @property
    def squares(self) -> dict[str, float]:
        """S^2 at each norm of the stream."""
        found, scale = {}, 1.0
        for i in range(self.shape.num_layers):
            attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
            if self.shape.shared_norm:
                found[f"layers.{i}.norm"] = scale**2
            else:
                found[f"{attn}.norm"] = scale**2
                found[f"{mlp}.norm"] = (scale if self.shape.traits.parallel != "none" else self.after[attn]) ** 2
            scale = self.after[mlp]
        return {**found, "norm": scale**2}

    @property
    def norm_eps(self) -> float:
        """The epsilon for all norms of the rescaled stream."""
        squares = self.squares.values()
        return 2 * self.shape.norm_eps / (min(squares) + max(squares))
