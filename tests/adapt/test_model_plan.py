"""`umup.plan` on plain torch modules: the same run as umup's own decoder, and one line for every bad input.

The strongest check is `test_plain_torch_trains_like_umups_own_decoder`: the decoder carries multipliers in its
operations, the plain module in its init and rates, and their losses agree to 1e-10.
"""

import json
import pickle
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import umup
from umup.config.sections import BaseShape, ModelConfig
from umup.errors import PlanError
from umup.models.build import decoder, initialise
from umup.models.specs import architecture, base_architecture, base_shape_of, shape_of
from umup.ops.attention import rotary, rotary_tables
from umup.rules.plan import Plan, make_plan
from umup.rules.schemes import SCHEMES

# These decays are large so that their effect is seen.
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay. independent decay")
BATCH, SEQ, VOCAB, STEPS = 4, 16, 64, 5
RELATIVE = [name for name, table in SCHEMES.items() if table.needs_base]


class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.head_dim = s.head_dim
        self.norm = norm(s)
        self.q, self.out = (nn.Linear(s.hidden_size, s.hidden_size, s.traits.attention_bias) for _ in range(2))
        self.k, self.v = (nn.Linear(s.hidden_size, s.kv_size, s.traits.attention_bias) for _ in range(2))

    def forward(self, x, rotation):
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if rotation is not None:
            q, k = rotary(q, *rotation), rotary(k, *rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.norm, self.gated = norm(s), s.traits.activation == "gated_silu"
        self.up = nn.Linear(s.hidden_size, s.intermediate_size, s.traits.attention_bias)
        self.down = nn.Linear(s.intermediate_size, s.hidden_size, s.traits.attention_bias)
        if self.gated:
            self.gate = nn.Linear(s.hidden_size, s.intermediate_size, s.traits.attention_bias)

    def forward(self, x):
        h = self.norm(x)
        inner = F.silu(self.gate(h)) * self.up(h) if self.gated else F.gelu(self.up(h), approximate="tanh")
        return x + self.down(inner)


class Block(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.attn, self.mlp = Attention(s), MLP(s)

    def forward(self, x, rotation):
        return self.mlp(self.attn(x, rotation))


def norm(s):
    return {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[s.traits.norm](s.hidden_size, s.norm_eps)


class Plain(nn.Module):
    """The decoder of umup/models/decoder.py as anyone would write it, with the same parameter names."""

    def __init__(self, s):
        super().__init__()
        self.embed = nn.Embedding(s.vocab_size, s.hidden_size)
        self.rotation = None
        if s.traits.positions == "learned":
            self.positions = nn.Embedding(s.max_seq_len, s.hidden_size)
        else:
            self.rotation = rotary_tables(s.head_dim, s.max_seq_len, s.rope_theta)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.num_layers))
        self.norm = norm(s)
        self.head = nn.Linear(s.hidden_size, s.vocab_size, bias=False)
        if s.traits.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        if self.rotation is None:
            x = x + self.positions.weight
        for layer in self.layers:
            x = layer(x, self.rotation)
        return self.head(self.norm(x))

    def loss(self, ids, targets):
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())


def config(**changes):
    sizes = {"family": "llama", "hidden_size": 64, "num_layers": 4, "head_dim": 8, "vocab_size": VOCAB}
    return shape_of(ModelConfig(**{**sizes, "max_seq_len": SEQ, **changes}))


def small(depth=2, **changes):
    return replace(base_shape_of(config(**changes), BaseShape(hidden_size=16)), num_layers=depth)


def adamw(groups):
    return [torch.optim.AdamW(groups(lr=0.01, eps=1e-3, weight_decay=0.1), betas=(0.9, 0.95))]


def sgd(groups):
    return [torch.optim.SGD(groups(lr=0.02, weight_decay=0.01), momentum=0.9, nesterov=True)]


def muon(groups):
    own = torch.optim.Muon(groups(lr=0.02, weight_decay=0.1, part="muon"))
    return [own, torch.optim.AdamW(groups(lr=0.01, eps=1e-3, weight_decay=0.1, part="adamw"))]


OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "muon": muon}


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (2, BATCH, SEQ), generator=generator)] * STEPS


def train(model, optimizers, steps=None):
    losses = []
    for ids, targets in steps or batches():
        loss = model.loss(ids, targets)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def effective(name, weight, shape, scheme, base, hparams, options):
    """The decoder's weight with everything that multiplies its product, worked out by hand."""
    leaf = name.split(".")[-2]
    if leaf in ("embed", "positions"):
        return weight * hparams["alpha_emb"]
    if leaf == "head":
        return weight * hparams["alpha_out"] * base.hidden_size / shape.hidden_size
    if leaf == "q":
        return weight * (base.head_dim / shape.head_dim) ** 0.5
    if leaf in ("out", "down"):
        alpha = {"mup": 0.0, "depth_mup": 0.5, "completep": float(options.get("depth_alpha", 1))}[scheme]
        return weight * (base.num_layers / shape.num_layers) ** alpha
    return weight


CASES = {
    "mup": ("mup", {}, {}, {}),
    "mup, other depth at the base": ("mup", {"num_layers": 3}, {}, {}),
    "mup, grouped queries": ("mup", {"num_kv_heads": 4}, {}, {}),
    "mup, as many keys at the base": ("mup", {"num_kv_heads": 2}, {"num_kv_heads": 2}, {}),
    "mup, tied": ("mup", {"tie_embeddings": True}, {}, {}),
    "mup, larger heads": ("mup", {"head_dim": 32}, {"head_dim": 8}, {}),
    "mup, biases and positions": ("mup", {"family": "gpt2"}, {}, {}),
    "depth_mup": ("depth_mup", {"num_layers": 8}, {}, {}),
    "completep": ("completep", {}, {}, {}),
    "completep, tied, grouped queries": ("completep", {"tie_embeddings": True, "num_kv_heads": 4}, {}, {}),
    "completep, biases, positions, larger heads": (
        "completep",
        {"family": "gpt2", "head_dim": 32},
        {"head_dim": 8},
        {},
    ),
    "completep, alpha of a half": ("completep", {"num_layers": 8}, {}, {"depth_alpha": "0.5"}),
    "completep, deeper base": ("completep", {"num_layers": 1}, {}, {}),
}


COUPLED = ("mup, tied", "completep, alpha of a half")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("case", "independent"), [*((case, True) for case in CASES), *((case, False) for case in COUPLED)]
)
def test_plain_torch_trains_like_umups_own_decoder(case, independent, optimizer):
    scheme, changes, at_base, options = CASES[case]
    shape = config(**changes)
    base = BaseShape(hidden_size=16, num_layers=2, **at_base)
    base_shape = replace(base_shape_of(shape, base), num_layers=2)
    hparams = {"alpha_emb": 2.0, "eta_emb": 3.0, "alpha_out": 4.0}
    chosen = {
        "optimizer": optimizer,
        "independent_weight_decay": independent,
        "hparams": hparams,
        "options": options,
    }

    tokens = BATCH * SEQ
    table = make_plan(scheme, architecture(shape, tokens), base_architecture(shape, base, tokens), **chosen)
    ours = decoder(shape, table, torch.float64)
    initialise(ours, table, seed=0)
    ours = ours.double()

    plain = Plain(shape).double()
    plan = umup.plan(plain, lambda: Plain(base_shape), scheme=scheme, **chosen)
    plan.apply(plain)
    with torch.no_grad():
        stored = dict(ours.named_parameters())
        for name, p in plain.named_parameters():
            p.copy_(effective(name, stored[name], shape, scheme, base_shape, hparams, options))

    def own_groups(**numbers):
        return umup.param_groups(table, ours.named_parameters(), **{"weight_decay": 0.0, **numbers})

    def groups(**numbers):
        return plan.param_groups(plain, **numbers)

    make = OPTIMIZERS[optimizer]
    expected, losses = train(ours, make(own_groups)), train(plain, make(groups))
    assert expected[-1] < expected[0] - 0.05
    assert torch.allclose(losses, expected, rtol=1e-10), (losses - expected).abs().max()


def global_rate(name, model):
    """The optimizers that someone without umup would write, with one rate."""
    if name == "muon":
        inside = [p for p in model.layers.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if all(p is not q for q in inside)]
        return [torch.optim.Muon(inside, lr=0.02, weight_decay=0.0), torch.optim.AdamW(rest, lr=0.02, weight_decay=0.0)]
    return [{"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name](model.parameters(), lr=0.02, weight_decay=0.0)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheme", RELATIVE)
def test_at_the_base_it_is_the_run_without_umup_bit_for_bit(scheme, optimizer):
    def model():
        torch.manual_seed(3)
        return Plain(small(tie_embeddings=True))

    mine, theirs = model(), model()
    with pytest.warns(UserWarning, match="base and model have the same shapes, so the plan changes nothing") as warned:
        plan = umup.plan(mine, model, scheme=scheme, optimizer=optimizer)
    assert warned[0].filename == __file__
    assert str(plan.apply(mine)).startswith("nothing to do")
    assert "the same shapes" in plan.explain()
    if optimizer == "muon":
        own = torch.optim.Muon(plan.param_groups(mine, lr=0.02, part="muon"))
        optimizers = [own, torch.optim.AdamW(plan.param_groups(mine, lr=0.02, part="adamw"))]
    else:
        kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        optimizers = [kinds[optimizer](plan.param_groups(mine, lr=0.02))]
    assert torch.equal(train(mine, optimizers), train(theirs, global_rate(optimizer, theirs)))


def planned(scheme="mup", optimizer="adamw", **changes):
    model = Plain(config(**changes))
    plan = umup.plan(
        model, lambda: Plain(small(**changes)) if scheme in RELATIVE else None, scheme=scheme, optimizer=optimizer
    )
    return model, plan


def test_a_plan_is_read_whole():
    model, plan = planned("completep")
    assert Plan.from_json(plan.to_json()) == plan.folded
    assert json.loads(plan.to_json())["scheme"] == "completep"
    text = plan.explain()
    assert "layers.*.attn.out.weight" in text
    assert "init_std: schemes relative to a base keep the module's own init" in text
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    again.apply(model)


@pytest.mark.parametrize("scheme", ["sp", "ntp", "spectral"])
def test_absolute_schemes_need_no_base(scheme):
    model = Plain(config())
    plan = umup.plan(model, scheme=scheme)
    plan.apply(model)
    train(model, [torch.optim.AdamW(plan.param_groups(model, lr=1e-3))])


def test_a_wider_base_is_allowed_and_said():
    model, base = Plain(small()), Plain(config())
    plan = umup.plan(model, base)
    assert "the base is wider than the model" in plan.explain()
    rates = {g["names"][0]: g["lr"] for g in plan.param_groups(model, lr=1.0)}
    assert rates["layers.0.attn.q.weight"] == 4.0


# --- bad input ---------------------------------------------------------------------------------------------------


class Odd(Plain):
    def __init__(self, s):
        super().__init__(s)
        self.extra = nn.Linear(s.hidden_size, s.hidden_size)


def shared_badly():
    model = Plain(config())
    model.layers[0].attn.out.weight = model.layers[0].attn.q.weight
    return model


BAD_PLANS = {
    "another tree": (
        lambda: umup.plan(Plain(config()), Odd(small())),
        r"^extra\.(weight|bias) is in the base but not in the model; build both from the same class",
    ),
    "another tree, the other way": (
        lambda: umup.plan(Odd(config()), Plain(small())),
        r"^extra\.weight is in the model but not in the base",
    ),
    "no base": (lambda: umup.plan(Plain(config())), r"scheme 'mup' is relative to a base; write base="),
    "unknown scheme": (lambda: umup.plan(Plain(config()), scheme="mupp"), "unknown scheme 'mupp'"),
    "unknown optimizer": (
        lambda: umup.plan(Plain(config()), Plain(small()), optimizer="adamx"),
        "unknown optimizer 'adamx'",
    ),
    "unit scaling": (
        lambda: umup.plan(Plain(config()), scheme="umup"),
        r"'umup' scales every operation.*write umup\.plan\(umup\.unit_scale\(model, \*example_inputs\), \.\.\.\)",
    ),
    "norms at the end": (lambda: umup.plan(Plain(config()), scheme="mus"), "blocks that normalise their output"),
    "sigma_init": (
        lambda: umup.plan(Plain(config()), Plain(small()), hparams={"sigma_init": 0.1}),
        r"^plan: hparams\.sigma_init: the module's own init is the base's",
    ),
    "alpha_attn": (
        lambda: umup.plan(Plain(config()), Plain(small()), hparams={"alpha_attn": 2.0}),
        r"^plan: hparams\.alpha_attn: the softmax scale is the module's own",
    ),
    "unknown hyperparameter": (
        lambda: umup.plan(Plain(config()), Plain(small()), hparams={"alpha": 2.0}),
        "alpha",
    ),
    "one storage, two roles": (
        lambda: umup.plan(shared_badly(), Plain(small())),
        r"layers\.0\.attn\.out\.weight .* shares its storage with layers\.0\.attn\.q\.weight",
    ),
    "hyperparameters as text": (
        lambda: umup.plan(Plain(config()), Plain(small()), hparams={"alpha_out": "2.0"}),
        r"^parametrization\.hparams\.alpha_out: must be a number, not str '2\.0'$",
    ),
    "a choice that is no number of the option": (
        lambda: umup.plan(Plain(config()), Plain(small()), scheme="completep", options={"depth_alpha": 0.7}),
        r"^parametrization\.options\.depth_alpha: unknown choice '0\.7'",
    ),
    "another case": (
        lambda: umup.plan(Plain(config()), Plain(small()), optimizer="AdamW"),
        r"unknown optimizer 'AdamW'; did you mean 'adamw'\?",
    ),
    "no name at all": (
        lambda: umup.plan(Plain(config()), Plain(small()), overrides={"*.up.weight": 3}),
        r"unknown role 3; known: ",
    ),
    "compiled": (
        lambda: umup.plan(torch.compile(Plain(config())), Plain(small())),
        r"^the model is wrapped in OptimizedModule: plan and apply before wrapping",
    ),
    "unknown role": (
        lambda: umup.plan(Plain(config()), Plain(small()), overrides={"*.up.weight": "hiden"}),
        "unknown role 'hiden'; did you mean 'hidden'",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises some of its own
@pytest.mark.parametrize("case", BAD_PLANS)
def test_bad_input_is_one_line_that_says_what_to_write(case):
    make, match = BAD_PLANS[case]
    with pytest.raises(PlanError, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_muon_is_made_of_two_parts():
    model, plan = planned(optimizer="muon")
    with pytest.raises(PlanError, match=r"part='muon' and part='adamw'; ask for one at a time"):
        plan.param_groups(model, lr=0.1)
    matrices, rest = (plan.param_groups(model, lr=0.1, part=part) for part in ("muon", "adamw"))
    names = [{name for g in groups for name in g["names"]} for groups in (matrices, rest)]
    assert names[0] | names[1] == dict(model.named_parameters()).keys()
    assert not names[0] & names[1]
    assert all(name.startswith("layers.") and model.get_parameter(name).ndim == 2 for name in names[0])


def test_groups_want_the_plans_own_model():
    _, plan = planned()
    deeper = Plain(config(num_layers=5))
    with pytest.raises(PlanError, match=r"only the model has the parameter 'layers\.4"):
        plan.param_groups(deeper, lr=0.1)
    model = Plain(config())
    del model.layers[1].mlp.up
    with pytest.raises(PlanError, match=r"only the plan has the parameter 'layers\.1\.mlp\.up\.weight'"):
        plan.param_groups(model, lr=0.1)


def test_frozen_parameters_are_left_out():
    model, plan = planned()
    model.layers[0].requires_grad_(False)
    names = {name for g in plan.param_groups(model, lr=0.1) for name in g["names"]}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_tie_that_was_lost_is_noticed():
    model, plan = planned(tie_embeddings=True)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    for use in (lambda: plan.apply(model), lambda: plan.param_groups(model, lr=0.1)):
        with pytest.raises(PlanError, match=r"^head\.weight was tied to embed\.weight and is not any more"):
            use()


def test_names_like_those_of_wrappers_are_a_models_own():
    class Held(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.module = Plain(shape)

    model = Held(config())
    plan = umup.plan(model, Held(small()))
    ddp = nn.ModuleDict({"module": model})
    compiled = nn.ModuleDict({"_orig_mod": ddp})
    for wrapped in (model, ddp, compiled):
        names = [name for g in plan.param_groups(wrapped, lr=0.1) for name in g["names"]]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())


# --- schedulers --------------------------------------------------------------------------------------------------

S = torch.optim.lr_scheduler
MULTIPLYING = {
    "lambda": lambda o: S.LambdaLR(o, lambda step: 1 / (step + 1)),
    "cosine": lambda o: S.CosineAnnealingLR(o, 12),
    "warmup and cosine": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, 1, 3), S.CosineAnnealingLR(o, 9)], [3]),
    "one cycle, a rate per group": lambda o: S.OneCycleLR(o, [g["initial_lr"] for g in o.param_groups], 12),
    "exponential": lambda o: S.ExponentialLR(o, 0.5),
    "plateau": lambda o: S.ReduceLROnPlateau(o, patience=0),
}
ABSOLUTE = {
    "one cycle": lambda o: S.OneCycleLR(o, 0.1, 12),
    "cosine to a floor": lambda o: S.CosineAnnealingLR(o, 12, eta_min=1e-3),
    "cyclic": lambda o: S.CyclicLR(o, 1e-3, 1e-1, 4, cycle_momentum=False),
}


def scheduled(make):
    model, plan = planned()
    optimizer = torch.optim.AdamW(plan.param_groups(model, lr=0.01))
    first = [g["lr"] for g in optimizer.param_groups]
    assert [g["initial_lr"] for g in optimizer.param_groups] == first
    scheduler = make(optimizer)
    plan.guard(optimizer)
    for ids, targets in batches() * 2:
        model.loss(ids, targets).backward()
        optimizer.step()
        scheduler.step(*[1.0] if isinstance(scheduler, S.ReduceLROnPlateau) else [])
    return first, [g["lr"] for g in optimizer.param_groups]


@pytest.mark.parametrize("name", MULTIPLYING)
def test_schedulers_multiply_the_plans_rates(name):
    first, last = scheduled(MULTIPLYING[name])
    factors = [b / a for a, b in zip(first, last, strict=True)]
    assert len(set(first)) > 1
    assert factors == pytest.approx([factors[0]] * len(factors), rel=1e-9)
    assert factors[0] != 1


@pytest.mark.parametrize("name", ABSOLUTE)
def test_the_guard_refuses_absolute_rates(name):
    with pytest.raises(PlanError, match=r"times the plan's: a scheduler writes absolute rates; let it multiply"):
        scheduled(ABSOLUTE[name])


def test_the_guard_outlives_a_loaded_state():
    model, plan = planned()
    optimizer = torch.optim.AdamW(plan.param_groups(model, lr=0.01))
    plan.guard(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises(PlanError, match="a scheduler writes absolute rates"):
        optimizer.step()


# --- size --------------------------------------------------------------------------------------------------------


def test_a_model_of_seven_billion_parameters_is_planned_in_seconds():
    sizes = {"hidden_size": 4096, "num_layers": 32, "head_dim": 128, "vocab_size": 32000, "intermediate_size": 11008}
    with torch.device("meta"):
        model = Plain(config(**sizes))
    assert sum(p.numel() for p in model.parameters()) > 6.5e9
    start = time.perf_counter()
    base = config(**{**sizes, "hidden_size": 256, "intermediate_size": 688, "num_layers": 4})
    plan = umup.plan(model, lambda: Plain(base), scheme="completep")
    seconds = time.perf_counter() - start
    print(f"planned in {seconds:.2f} s")
    assert seconds < 20
    assert plan.folded.params["layers.31.mlp.down.weight"]["lr"] == pytest.approx(688 / 11008 * 4 / 32)


# --- what depth rules must know ----------------------------------------------------------------------------------


class Branches(nn.Module):
    """One block of two branches whose outputs have the given names."""

    def __init__(self, width, attn_out, mlp_out):
        super().__init__()
        self.norm, self.q = nn.LayerNorm(width), nn.Linear(width, width)
        self.first, self.unused = nn.Linear(width, 4 * width), nn.Linear(width, width)
        self.add_module(attn_out, nn.Linear(width, width))
        self.add_module(mlp_out, nn.Linear(4 * width, width))


def stack(width, layers, *names):
    return nn.ModuleDict({"h": nn.ModuleList(Branches(width, *names) for _ in range(layers))})


DEPTH_SCHEMES = [name for name in RELATIVE if SCHEMES[name].needs_base_depth]


@pytest.mark.parametrize("scheme", DEPTH_SCHEMES)
def test_the_override_that_a_refusal_names_is_taken(scheme):
    names = ("a", "b")
    model, base = stack(64, 4, *names), stack(16, 2, *names)
    with pytest.raises(PlanError, match=r"no matrix of h\.0 is known .*'hidden_out'"):
        umup.plan(model, base, scheme=scheme)
    plan = umup.plan(model, base, scheme=scheme, overrides={"h.*.a.weight": "hidden_out", "h.*.b.weight": "hidden_out"})
    assert all("branch" in plan.plan.params[f"h.3.{leaf}.weight"].values["multiplier"].rule for leaf in names)
    # One layer is no repetition; that something in it writes makes it a block.
    plan = umup.plan(
        stack(64, 1, *names), stack(16, 2, *names), scheme=scheme, overrides={"*.[ab].weight": "hidden_out"}
    )
    assert plan.plan.sizes.num_layers == 1


@pytest.mark.parametrize("scheme", DEPTH_SCHEMES)
def test_a_branch_beside_a_known_one_is_never_left_out_silently(scheme):
    model, base = stack(64, 4, "wo", "shrink"), stack(16, 2, "wo", "shrink")
    with pytest.raises(PlanError, match=r"h\.0\.shrink\.weight may write .*\{'h\.\*\.shrink\.weight': 'hidden_out'\}"):
        umup.plan(model, base, scheme=scheme)
    for role, scaled in (("hidden_out", True), ("hidden", False)):
        plan = umup.plan(model, base, scheme=scheme, overrides={"h.*.shrink.weight": role})
        assert ("branch" in plan.plan.params["h.0.shrink.weight"].values["multiplier"].rule) is scaled
    umup.plan(model, base, scheme="mup")


# --- notes -------------------------------------------------------------------------------------------------------


def notes_of(make, target, base, **arguments):
    return "\n".join(umup.plan(make(target), None if base is None else make(base), **arguments).notes)


def test_guessed_roles_are_said_whatever_the_base():
    assert "roles were guessed" in notes_of(lambda layers: Plain(small(layers)), 4, 2, scheme="completep")
    assert "roles were guessed" in notes_of(lambda layers: Plain(small(layers)), 2, None, scheme="ntp")
    assert "guessed" not in umup.plan(Plain(config()), Plain(small())).explain()


def test_a_side_that_grows_alone_is_said():
    def net(sizes):
        width, classes = sizes
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, classes))

    assert "3.weight: a side of 1000 here and 10 in the base" in notes_of(net, (64, 1000), (16, 10))
    assert notes_of(net, (64, 10), (16, 10)) == ""
    assert notes_of(net, (64, 1000), (16, 10), overrides={"3.weight": "readout"}) == ""


def test_an_unknown_head_size_is_said():
    class Attend(nn.Module):
        def __init__(self, width, **sizes):
            super().__init__()
            self.heads, self.scale = 2, (width // 2) ** -0.5
            self.__dict__.update(sizes)
            self.to_q, self.to_out = nn.Linear(width, width), nn.Linear(width, width)

    def known(width):
        return nn.ModuleDict({"attn": Attend(width, head_dim=width // 2), "attn_norm": nn.LayerNorm(width)})

    assert "head size of attn is not known" in notes_of(lambda w: nn.ModuleDict({"attn": Attend(w)}), 64, 16)
    assert notes_of(known, 64, 16) == ""


# --- groups ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_large_independent_decay_is_warned_of():
    model, plan = planned()
    with pytest.warns(
        UserWarning, match=r"takes 10% of every weight per step; AdamW's 0\.1 at lr 0\.0003 is 3e-05 here"
    ):
        plan.param_groups(model, lr=3e-4, weight_decay=0.1)
    plan.param_groups(model, lr=3e-4, weight_decay=0.01)
    coupled = umup.plan(model, Plain(small()), independent_weight_decay=False)
    coupled.param_groups(model, lr=3e-4, weight_decay=0.1)


@pytest.mark.parametrize("lr", [0, -1.0, float("nan")])
def test_rates_must_be_above_zero(lr):
    model, plan = planned()
    with pytest.raises(PlanError, match="lr must be above 0"):
        plan.param_groups(model, lr=lr)


def test_muon_without_matrices_says_where_the_rest_goes():
    def net(width):
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Conv2d(width, 4, 3))

    model = net(16)
    plan = umup.plan(model, net(8), optimizer="muon")
    with pytest.raises(PlanError, match=r"part='muon' has no parameters.*convolutions and vectors go to part='adamw'"):
        plan.param_groups(model, lr=0.1, part="muon")
    assert plan.param_groups(model, lr=0.1, part="adamw")


def test_choices_may_be_numbers():
    model, base = Plain(config(num_layers=8)), Plain(small())
    plans = [
        umup.plan(model, base, scheme="completep", options={"depth_alpha": alpha})
        for alpha in (1, 1.0, "1", 0.5, "0.5")
    ]
    assert plans[0] == plans[1] == plans[2] != plans[3] == plans[4]


GUARDED = {
    ("adamw", "AdamW"): True,
    ("adamw", "SGD"): False,
    ("adam", "AdamW"): True,
    ("adam", "Adam"): True,
    ("sgd", "SGD"): True,
    ("sgd", "AdamW"): False,
    ("lion", "RMSprop"): False,
    ("muon", "AdamW"): True,
    ("muon_match_rms_adamw", "Muon"): True,
    ("muon", "Adafactor"): False,
}
TORCH = {name: getattr(torch.optim, name) for _, name in GUARDED}


@pytest.mark.parametrize(("family", "name"), GUARDED)
def test_the_guard_knows_the_plans_family(family, name):
    model, plan = planned(optimizer=family)
    part = None if "muon" not in family else "adamw" if name != "Muon" else family
    groups = [{key: g[key] for key in ("params", "names", "lr")} for g in plan.param_groups(model, lr=0.1, part=part)]
    if family == "adam":
        groups = plan.param_groups(model, lr=0.1)
    optimizer = TORCH[name](groups)
    if GUARDED[family, name]:
        plan.guard(optimizer)
    else:
        with pytest.raises(
            PlanError, match=rf"^guard: the plan is for '{family}', whose rates are not those of {name}"
        ):
            plan.guard(optimizer)


def test_the_guard_knows_coupled_from_decoupled():
    model, plan = planned()

    def adam(**arguments):
        return torch.optim.Adam(plan.param_groups(model, lr=0.1, weight_decay=1e-4), **arguments)

    with pytest.raises(PlanError, match="not those of Adam;"):
        plan.guard(adam())
    plan.guard(adam(decoupled_weight_decay=True))
