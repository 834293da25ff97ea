"""What `plan.apply` does to initial weights, tied heads and attention whose head size grows."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import umup
from umup.errors import PlanError

VOCAB, SEQ, BASE, WIDTH, LAYERS = 48, 8, 64, 256, 3
DRAWS = {
    "normal(0.02)": lambda w: nn.init.normal_(w, 0, 0.02),
    "uniform(0.1)": lambda w: nn.init.uniform_(w, -0.1, 0.1),
    "torch": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "lecun": lambda w: nn.init.kaiming_normal_(w, nonlinearity="linear"),
    "kaiming, fan_out": lambda w: nn.init.kaiming_normal_(w, mode="fan_out"),
    "xavier": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "cut": lambda w: nn.init.trunc_normal_(w, 0, 0.02, -0.04, 0.04),
}


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Patches and tokens in, classes out: every role but attention's."""

    def __init__(self, width, layers=LAYERS, draw=None, tied=False):
        super().__init__()
        self.patches = nn.Conv1d(4, width, 4, stride=4)
        self.embed, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(64, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        if draw is not None:
            for p in self.parameters():
                if p.ndim > 1:
                    draw(p)

    def forward(self, ids, signal):
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1])) + self.patches(signal).mT
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def stds(model):
    return {name: p.detach().double().std().item() for name, p in model.named_parameters()}


def expected_factor(name, scheme):
    """Table 3 of 2203.03466 for Adam: hidden 1/fan_in in variance, readout 1/fan_in^2, all else as at the base."""
    leaf, ratio = name.split(".")[-2], WIDTH / BASE
    if not name.endswith("weight"):
        branch = 1.0
    elif name == "head.weight":
        return 1 / ratio
    else:
        branch = {"up": ratio**-0.5, "down": ratio**-0.5}.get(leaf, 1.0)
    if scheme == "completep" and leaf == "down":
        branch *= 2 / LAYERS
    return branch


@pytest.mark.parametrize("scheme", ["mup", "completep"])
@pytest.mark.parametrize("draw", DRAWS)
def test_initial_stds_are_the_bases_times_the_rule(draw, scheme):
    base, model = Net(BASE, 2, DRAWS[draw]), Net(WIDTH, LAYERS, DRAWS[draw])
    applied = umup.plan(model, base, scheme=scheme).apply(model)
    theirs = stds(base)
    for name, found in stds(model).items():
        # Small samples at the base; its biases have 48 numbers, and the fused layers 2 * 64.
        other = name.replace("layers.2", "layers.1")
        elements = base.get_parameter(other).numel()
        wanted = theirs[other] * expected_factor(name, scheme)
        assert found == pytest.approx(wanted, rel=4 / math.sqrt(elements), abs=1e-12), (name, applied.inits[name])


def test_each_law_is_left_alone_where_it_follows_width_already():
    model = Net(WIDTH)
    applied = umup.plan(model, Net(BASE)).apply(model)
    moved = {name for name, factor in applied.factors.items() if factor != 1.0}
    # torch's 1/sqrt(fan_in) is muP's for hidden matrices; a bias and a readout follow width where they should not.
    assert moved == {f"layers.{i}.{part}.bias" for i in range(LAYERS) for part in ("up", "down")} | {
        "head.weight",
        "head.bias",
    }
    assert applied.factors["layers.0.up.bias"] == pytest.approx(2.0)
    assert applied.factors["head.weight"] == pytest.approx(0.5)
    assert str(applied).splitlines() == [
        "layers.*.up.bias: init (torch_default) times 2",
        "layers.*.down.bias: init (torch_default) times 2",
        "head.weight: init (torch_default) times 0.5",
        "head.bias: init (torch_default) times 2",
    ]


def test_zeros_stay_and_constants_take_folded_multipliers():
    def draw(width, layers):
        model = Net(width, layers)
        nn.init.zeros_(model.head.weight)
        for layer in model.layers:
            nn.init.ones_(layer.down.bias)
        return model

    model = draw(WIDTH, 4)
    applied = umup.plan(model, draw(BASE, 2), scheme="completep", hparams={"alpha_emb": 3.0}).apply(model)
    assert not model.head.weight.any()
    assert applied.factors["head.weight"] == 1.0
    assert torch.equal(model.layers[3].down.bias, torch.full((WIDTH,), 0.5))
    assert torch.equal(model.layers[0].norm.weight, torch.ones(WIDTH))
    assert applied.factors["embed.weight"] == 3.0


@pytest.mark.parametrize("scheme", ["ntp", "spectral"])
def test_absolute_schemes_replace_the_size_of_the_init(scheme):
    model = Net(WIDTH)
    umup.plan(model, scheme=scheme).apply(model)
    found = stds(model)
    assert found["embed.weight"] == pytest.approx(1.0, rel=0.05)
    assert found["layers.0.up.weight"] == pytest.approx(WIDTH**-0.5, rel=0.05)
    down = (4 * WIDTH) ** -0.5 * (1 if scheme == "ntp" else 0.5)
    assert found["layers.0.down.weight"] == pytest.approx(down, rel=0.05)


def test_sp_leaves_everything():
    model = Net(WIDTH)
    before = copy.deepcopy(model.state_dict())
    applied = umup.plan(model, scheme="sp").apply(model)
    assert str(applied) == "nothing to do: the model is as the plan wants it"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if name != "umup_plan")


# --- what is refused -----------------------------------------------------------------------------------------------


def trained(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(VOCAB, (4, SEQ), generator=generator)
        signal = torch.randn(4, 4, 4 * SEQ, generator=generator)
        F.cross_entropy(model(ids, signal).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    return model


def test_it_is_done_once():
    model = Net(WIDTH)
    plan = umup.plan(model, Net(BASE))
    fresh = copy.deepcopy(model)
    plan.apply(model)
    for again in (model, copy.deepcopy(model)):
        with pytest.raises(PlanError, match="a plan was applied to this model before; build it anew"):
            plan.apply(again)
    plan.apply(fresh)


def test_meta_parameters_are_refused():
    with torch.device("meta"):
        model = Net(WIDTH)
    plan = umup.plan(model, Net(BASE))
    with pytest.raises(PlanError, match=r"^apply: patches\.weight is on the meta device; first model\.to_empty"):
        plan.apply(model)


def test_another_model_is_refused():
    plan = umup.plan(Net(WIDTH), Net(BASE))
    with pytest.raises(PlanError, match=r"only the model has the parameter 'layers\.3\."):
        plan.apply(Net(WIDTH, 4))
    with pytest.raises(PlanError, match=r"patches\.weight is \(128, 4, 4\) here and \(256, 4, 4\) in the plan"):
        plan.apply(Net(128))


@pytest.mark.parametrize("how", ["trained", "multiplied"])
def test_weights_that_are_not_fresh_are_refused_by_name(how):
    plan = umup.plan(Net(WIDTH), Net(BASE))
    model = trained(Net(WIDTH)) if how == "trained" else Net(WIDTH)
    if how == "multiplied":
        model.layers[1].up.weight.data *= 1.3
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=r"^[\w.*]+ has a std of .* apply\(\) wants freshly initialised weights"):
        plan.apply(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_checkpoint_goes_into_a_model_that_was_built_and_applied():
    model = Net(WIDTH)
    plan = umup.plan(model, Net(BASE))
    plan.apply(model)
    state = model.state_dict()
    assert state["umup_plan"].dtype == torch.uint8
    fresh = Net(WIDTH)
    with pytest.raises(RuntimeError, match="umup_plan"):
        fresh.load_state_dict(state)
    fresh = Net(WIDTH)
    plan.apply(fresh)
    fresh.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    other = Net(WIDTH)
    umup.plan(other, Net(BASE), scheme="completep").apply(other)
    assert not torch.equal(other.umup_plan, model.umup_plan)


# --- tied heads ----------------------------------------------------------------------------------------------------


def test_a_tied_head_scales_its_input():
    model = Net(WIDTH, tied=True).double()
    assert model.head.weight is model.embed.weight
    plain = copy.deepcopy(model)
    plan = umup.plan(model, Net(BASE, tied=True), hparams={"alpha_out": 3.0, "alpha_emb": 2.0})
    applied = plan.apply(model)
    hook = "head.weight is tied to embed.weight: a forward pre-hook scales its input by 0.375"
    assert applied.installed == (hook,)
    assert str(applied).splitlines()[-1] == hook
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    # The embedding's own multiplier is in the table: 2 * 3/8 is muP's 3 * 64/256.
    assert torch.allclose(model.head(x), plain.head(x) * 3 * BASE / WIDTH)
    assert torch.equal(model.embed.weight, 2 * plain.embed.weight)
    assert torch.equal(model.norm(x), plain.norm(x))


def test_a_head_with_two_names_is_scaled_once():
    def make(width):
        model = Net(width, tied=True).double()
        model.lm_head = model.head
        return model

    model = make(WIDTH)
    plain = copy.deepcopy(model)
    umup.plan(model, make(BASE)).apply(model)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    assert torch.allclose(model.lm_head(x), plain.lm_head(x) * BASE / WIDTH)


# --- attention whose head size grows -------------------------------------------------------------------------------


class Attention(nn.Module):
    """Two heads of width/2; `kind` says where its softmax scale can be put."""

    def __init__(self, width, kind, base_head_dim=None):
        super().__init__()
        self.heads, self.head_dim, self.kind, self.base_head_dim = 2, width // 2, kind, base_head_dim
        if "fused" in kind:
            self.c_attn = nn.Linear(width, 3 * width)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        if "norm" in kind:
            self.q_norm, self.k_norm = nn.RMSNorm(width // 2), nn.RMSNorm(width // 2)
        if "scaling" in kind:
            self.scaling = self.head_dim**-0.5
        if "divisor" in kind:
            self.scale = self.head_dim**0.5
        self.o_proj = nn.Linear(width, width)

    def project(self, x):
        return self.c_attn(x).chunk(3, -1) if "fused" in self.kind else (self.q_proj(x), self.k_proj(x), self.v_proj(x))

    def logit_scale(self):
        own = vars(self).get("scaling") or 1 / vars(self).get("scale", self.head_dim**0.5)
        # With a base this is muP's rule written out: sqrt(base_head_dim)/head_dim.
        return own if self.base_head_dim is None else math.sqrt(self.base_head_dim) / self.head_dim

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.project(x))
        if "norm" in self.kind:
            q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.logit_scale())
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Attending(nn.Module):
    def __init__(self, width, kind="", base_head_dim=None, attention=Attention):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": attention(width, kind, base_head_dim)}) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["attn"](x)
        return self.head(self.norm(x))


KINDS = {
    "q_proj": (),
    "fused": ("layers.0.attn.c_attn: a forward hook scales its queries by 0.5",),
    "fused, scaling": ("layers.0.attn.scaling, which scales its logits: they are multiplied by 0.5",),
    "fused, divisor": ("layers.0.attn.scale, which scales its logits: they are multiplied by 0.5",),
    "norm, scaling": ("layers.0.attn.scaling, which scales its logits: they are multiplied by 0.5",),
    "fused, norm, scaling": ("layers.0.attn.scaling, which scales its logits: they are multiplied by 0.5",),
}


@pytest.mark.filterwarnings("ignore:weight_decay. independent decay")
@pytest.mark.parametrize("kind", KINDS)
def test_softmax_scale_where_heads_grow_is_that_of_explicit_attention(kind):
    """sqrt(base_d)/d, compared with an attention that says so, over Adam steps in float64."""
    model = Attending(64, kind).double()
    plan = umup.plan(model, lambda: Attending(16, kind))
    applied = plan.apply(model)
    assert applied.installed[:1] == KINDS[kind]

    told = Attending(64, kind, base_head_dim=8).double()
    with torch.no_grad():
        for name, p in told.named_parameters():
            own = model.get_parameter(name)
            p.copy_(own * 2 if kind == "q_proj" and ".q_proj." in name else own)
    # The same groups, but for queries that carry no factor.
    groups = plan.param_groups(model, lr=0.01, weight_decay=0.1, eps=1e-3)
    theirs = [
        {
            **g,
            "params": [told.get_parameter(name)],
            "lr": g["lr"] * unfold,
            "eps": g["eps"] / unfold,
            "weight_decay": g["weight_decay"] / unfold,
        }
        for g in groups
        for name in g["names"]
        for unfold in [2.0 if kind == "q_proj" and ".q_proj." in name else 1.0]
    ]
    ids = torch.randint(VOCAB, (4, SEQ), generator=torch.Generator().manual_seed(2))
    mine, other = torch.optim.AdamW(groups), torch.optim.AdamW(theirs)
    for _ in range(5):
        losses = []
        for net, optimizer in ((model, mine), (told, other)):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(ids).flatten(0, 1), ids.roll(1).flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0] < 3.5


def test_logits_scale_as_the_root_of_the_head_sizes():
    model = Attending(64).double()
    x = torch.randn(2, SEQ, 64, dtype=torch.float64)
    attention = model.layers[0]["attn"]
    before = attention.q_proj(x)
    applied = umup.plan(model, lambda: Attending(16)).apply(model)
    # torch's init falls as muP's does, so that nothing but the factor moved the queries; their bias keeps its base std.
    assert applied.factors["layers.0.attn.q_proj.weight"] == pytest.approx(0.5)
    assert applied.factors["layers.0.attn.q_proj.bias"] == pytest.approx(0.5 * 2)
    assert torch.allclose(attention.q_proj(x) - attention.q_proj.bias, (before - attention.q_proj.bias) / 2)
    assert applied.factors["layers.0.attn.k_proj.weight"] == pytest.approx(1.0)


def test_an_attention_module_with_two_names_is_scaled_once():
    def make(width):
        model = Attending(width, "fused, scaling")
        model.layers[1]["attn"] = model.layers[0]["attn"]
        return model

    model = make(64)
    umup.plan(model, lambda: make(16)).apply(model)
    assert [layer["attn"].scaling for layer in model.layers] == [32**-0.5 / 2] * 2


class Unequal(Attention):
    """Queries wider than keys and values, fused: no third is theirs."""

    def __init__(self, width, kind, base_head_dim=None):
        super().__init__(width, "fused")
        self.qkv_proj = nn.Linear(width, 2 * width)
        del self.c_attn


class Torchs(nn.Module):
    def __init__(self, width, kind, base_head_dim=None):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("attention", "kind"), [(Torchs, ""), (Unequal, ""), (Attention, "norm"), (Attention, "fused, norm")]
)
def test_growing_heads_that_nothing_can_scale_are_refused(attention, kind):
    with pytest.raises(PlanError, match=r"its head size grows, and neither .* keep the head size and add heads"):
        umup.plan(Attending(64, kind, attention=attention), lambda: Attending(16, kind, attention=attention))
