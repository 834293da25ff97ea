"""A plan as Megatron-LM's command-line flags: `--scaling-recipe` and the base sizes.

Megatron-LM computes its own numbers from a base's sizes, so the flags say which of its recipes the plan is, and a plan
that none gives is refused. What follows is read in its code and documentation, not run by us: pull request 3058 (merged
in February 2026, flags `--use-mup`) and the stack around 4381, which renames them to `--scaling-recipe` and adds
`depth_mup`. Whether your version has the second is for you to check; `use_mup=True` writes the first.

    here                  there         what it does
    sp                    none
    mup                   mup           hidden rates 1/width, logits 1/width, softmax sqrt(base head_dim)/head_dim
    completep, alpha 1    depth_mup     mup, and branches of 1/depth
    depth_mup             (nothing)     its depth_mup is CompleteP, not 1/sqrt(depth)

What differs even then, and is small or yours to choose:
- decay is coupled there (`w *= 1 - lr*wd`). `mup` leaves it one number, so hidden matrices decay 1/width as fast;
  `depth_mup` multiplies theirs by the width, as a plan with independent_weight_decay=False does;
- `mup` scales epsilon for hidden matrices alone; here every gradient of 1/width has an epsilon of 1/width;
- vectors decay by Megatron's own rules.

Not covered: SGD and Muon, which `mup` knows and `depth_mup` refuses; encoders, MoE, MLA and inference, which Megatron's
depth recipe refuses; all flags that are no matter of the parametrization.
"""

from math import isclose

from umup.errors import PlanError
from umup.rules.plan import Plan
from umup.rules.roles import OpKind, Role

# Scheme -> recipe, and -> the merged flag.
RECIPES = {"sp": "none", "mup": "mup", "completep": "depth_mup"}
MERGED = {"mup": "--use-mup"}
HIDDEN = (Role.HIDDEN, Role.HIDDEN_OUT)
READOUTS = (Role.READOUT, Role.TIED_READOUT)
# Hyperparameters of the schemes -> their flags and Megatron's defaults; others must be 1.
FLAGS = {
    "sigma_init": ("--init-method-std", 0.02),
    "alpha_emb": ("--mup-embedding-mult", 1.0),
    "alpha_out": ("--mup-output-mult", 1.0),
}
CLOSE = 1e-9


def flags(plan: Plan, *, base_head_dim: int | None = None, use_mup: bool = False) -> str:
    """One flag with its value per line.

    plan: in the table's form (`ModelPlan.plan`, not `.folded`). base_head_dim: the base's head size, which all but sp
    need: without it Megatron's softmax scale is 1/head_dim. use_mup: the flags of pull request 3058.
    Raises PlanError for schemes, optimizers, hyperparameters and shapes that no recipe expresses.
    """
    _check(plan, use_mup)
    if RECIPES[plan.scheme] == "none":
        return "--scaling-recipe none\n"
    if base_head_dim is None:
        raise PlanError("megatron: write base_head_dim=<the base's head size>; Megatron's scale has sqrt of it")
    width = _width_ratio(plan)
    stem = "--mup-base" if use_mup else "--scaling-base"
    lines = [MERGED[plan.scheme] if use_mup else f"--scaling-recipe {RECIPES[plan.scheme]}"]
    lines.append(f"{stem}-hidden-size {_base(_hidden_size(plan), width)}")
    if RECIPES[plan.scheme] == "depth_mup":
        lines.append(f"{stem}-num-layers {_base(plan.sizes.num_layers, 1 / _branch(plan))}")
    lines.append(f"{stem}-head-dim {base_head_dim}")
    return "\n".join([*lines, *_hparams(plan, width), ""])


def _check(plan: Plan, use_mup: bool) -> None:
    if plan.scheme not in RECIPES:
        known = ", ".join(RECIPES)
        raise PlanError(f"megatron: no recipe is scheme {plan.scheme!r} (its depth_mup is completep); known: {known}")
    if plan.optimizer not in ("adam", "adamw"):
        raise PlanError(f"megatron: the recipes are read for Adam, not {plan.optimizer!r}; plan with optimizer='adamw'")
    roles = {p.spec.role for p in plan.params.values()}
    if Role.EMBEDDING not in roles or roles.isdisjoint(HIDDEN):
        raise PlanError(
            "megatron: its recipes are for transformers over tokens; the plan has no embedding, or no hidden"
        )
    if plan.options.get("depth_alpha", "1") != "1":
        raise PlanError("megatron: its depth_mup is CompleteP with depth_alpha 1; write options={'depth_alpha': '1'}")
    if use_mup and plan.scheme not in MERGED:
        raise PlanError(f"megatron: --use-mup is scheme 'mup', not {plan.scheme!r}; write use_mup=False")


def _hidden_size(plan: Plan) -> int:
    return next(p.spec.fan_out for p in plan.params.values() if p.spec.role is Role.EMBEDDING)


def _width_ratio(plan: Plan) -> float:
    """Width over base width, which Megatron has one of; every rate and the logits' multiplier must follow it."""
    hidden = {name: p for name, p in plan.stored.items() if p.spec.role in HIDDEN}
    width = 1 / next(iter(hidden.values()))["lr"]
    out = plan.hparams["alpha_out"]
    wanted = {name: (1 / p["lr"], width) for name, p in hidden.items()}
    wanted |= {n: (out / p["multiplier"], width) for n, p in plan.params.items() if p.spec.role in READOUTS}
    for name, (ratio, expected) in wanted.items():
        if not isclose(ratio, expected, rel_tol=CLOSE):
            raise PlanError(
                f"megatron: {name} grows by {ratio:g} where others grow by {expected:g}, and a recipe has one width; "
                "build the base with the same proportions (and pass ModelPlan.plan, not .folded)"
            )
    return width


def _branch(plan: Plan) -> float:
    kinds = (OpKind.RESIDUAL_ATTN, OpKind.RESIDUAL_MLP)
    return next(op["branch"] for op in plan.ops.values() if op.site.kind in kinds)


def _base(size: int, ratio: float) -> int:
    return round(size / ratio)


def _hparams(plan: Plan, width: float) -> list[str]:
    found = []
    for name, value in plan.hparams.items():
        flag, default = FLAGS.get(name, (None, 1.0))
        if value == default:
            continue
        # Megatron divides the logits by the width only where its own flag is left at 1.
        number = value / width if name == "alpha_out" else value
        if flag is None or number == default:
            raise PlanError(f"megatron: no flag gives hparams.{name}={value:g} here; leave it at 1")
        found.append(f"{flag} {number:.12g}")
    return found
