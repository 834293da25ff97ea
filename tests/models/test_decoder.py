"""The decoder of every family and scheme: what it is made of, what it computes, what it must not depend on."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from umup.config.load import parse_config
from umup.models.build import build, decoder, initialise
from umup.models.specs import architecture, decoder_specs, plan_for, shape_of
from umup.nn.modules import Attention, Dropout
from umup.ops.cache import KVCache
from umup.rules.plan import make_plan

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_kv_heads": 2},
    "gpt2": {"family": "gpt2"},
    "gpt2 untied": {"family": "gpt2", "tie_embeddings": False},
    "gpt3 post-norm": {"family": "gpt3", "norm_placement": "post", "embedding_norm": True},
    "gptj": {"family": "gptj", "rotary_dim": 4},
    "bloom": {"family": "bloom"},
    "falcon": {"family": "falcon"},
    "falcon two norms": {"family": "falcon", "parallel": "two_norms", "num_kv_heads": 2},
    "starcoder": {"family": "starcoder", "activation": "relu"},
    "mpt": {"family": "mpt", "activation": "gated_gelu"},
}
PLAIN = ("llama", "gpt2", "gpt2 untied")
SCHEMES = ("sp", "mup", "umup")
BATCH, LENGTH, VOCAB = 4, 12, 31
every_model = pytest.mark.parametrize(("family", "scheme"), list(product(FAMILIES, SCHEMES)))
every_family = pytest.mark.parametrize("family", FAMILIES)
every_plain_family = pytest.mark.parametrize("family", PLAIN)


def config_for(family, scheme="umup", recipe="fp32", seed=0, grad_accum=1, base=24, **model):
    """A small model, its width no power of two; muP's base is half of it."""
    sizes = {"hidden_size": 48, "num_layers": 2, "head_dim": 12, "vocab_size": VOCAB, "max_seq_len": LENGTH}
    return parse_config(
        {
            "model": {**sizes, **FAMILIES[family], **model},
            "parametrization": {"scheme": scheme, "base": {"hidden_size": base} if scheme == "mup" else None},
            "train": {"batch_size": BATCH // grad_accum, "grad_accum": grad_accum, "seed": seed},
            "precision": {"recipe": recipe},
        }
    )


def randomise(model):
    """Gains and biases off their initial constants, so that no term drops out of a comparison."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch():
    tokens, targets = torch.randint(VOCAB, (2, BATCH, LENGTH))
    return tokens, targets


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def assert_close(mine, reference, tolerance):
    """Equal relative to the largest entry of each tensor."""
    assert mine.keys() == reference.keys()
    for name, expected in reference.items():
        error = (mine[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        # The keys' bias moves all logits of a query alike: its gradient is zero, and what is there is rounding.
        assert error < tolerance or name.endswith("attn.k.bias"), name


@every_model
def test_specs_describe_what_build_makes(family, scheme):
    config = config_for(family, scheme)
    specs = decoder_specs(shape_of(config.model))
    model, plan = build(config), plan_for(config)
    built = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert list(built.items()) == [(s.name, s.shape) for s in specs if s.tied_to is None]
    assert list(plan.params) == [s.name for s in specs]
    everything = dict(model.named_parameters(remove_duplicate=False))
    assert everything.keys() == {s.name for s in specs}
    for spec in specs:
        if spec.tied_to is not None:
            assert everything[spec.name] is everything[spec.tied_to]
    assert any(s.tied_to for s in specs) == shape_of(config.model).traits.tie_embeddings
    assert not torch.cat([p.flatten() for p in model.parameters()]).isnan().any()


@pytest.mark.parametrize(
    ("family", "norm_gain", "names"),
    [
        ("llama", False, []),
        ("llama", None, ["layers.0.attn.norm.weight", "layers.0.mlp.norm.weight", "norm.weight"]),
        ("gpt2", False, []),
        ("gptj", None, [f"{norm}.{kind}" for norm in ("layers.0.norm", "norm") for kind in ("weight", "bias")]),
        ("mpt", None, ["layers.0.attn.norm.weight", "layers.0.mlp.norm.weight", "norm.weight"]),
        (
            "gpt3 post-norm",
            None,
            [
                f"{norm}.{kind}"
                for norm in ("embed_norm", "layers.0.attn_norm", "layers.0.mlp_norm")
                for kind in ("weight", "bias")
            ],
        ),
    ],
)
def test_norm_gains_exist_where_the_config_wants_them(family, norm_gain, names):
    config = config_for(family, num_layers=1, norm_gain=norm_gain)
    found = [name for name, _ in build(config).named_parameters() if "norm" in name]
    assert found == names == [s.name for s in decoder_specs(shape_of(config.model)) if "norm" in s.name]


def train(config, steps):
    """Losses and final parameters of a hand-written AdamW loop by the config's plan."""
    model, plan = build(config), plan_for(config)
    groups = [
        {"params": [p], "lr": 0.01 * q["lr"], "eps": 1e-8 * q["eps"], "weight_decay": 0.1 * q["weight_decay"]}
        for p, q in ((p, plan.params[name]) for name, p in model.named_parameters())
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=False)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        tokens, targets = torch.randint(VOCAB, (2, BATCH, LENGTH), generator=generator)
        optimizer.zero_grad()
        loss = model.loss(tokens, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: (p.detach(), p.grad) for name, p in model.named_parameters()}


@every_family
@pytest.mark.parametrize("num_layers", [2, 3])
def test_mup_at_its_base_is_sp_bit_for_bit(family, num_layers):
    sp, mup = (train(config_for(family, scheme, base=48, num_layers=num_layers), 3) for scheme in ("sp", "mup"))
    assert sp[0] == mup[0]
    for name, tensors in sp[1].items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, mup[1][name], strict=True)), name


@every_family
def test_mup_away_from_its_base_is_not_sp(family):
    assert train(config_for(family, "sp"), 1)[0] != train(config_for(family, "mup"), 1)[0]


# Dynamo and Inductor use what torch itself deprecates.
torch_warns_itself = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def check_compiled(family, backend):
    torch._dynamo.reset()
    model = randomise(build(config_for(family)))
    tokens, targets = batch()
    eager = model.loss(tokens, targets)
    compiled = torch.compile(model.loss, fullgraph=True, backend=backend)(tokens, targets)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=0)
    assert_close(gradients(model, compiled), gradients(model, eager), 1e-5)


@torch_warns_itself
@every_family
def test_the_loss_traces_as_one_graph_with_eagers_gradients(family):
    check_compiled(family, "aot_eager")


@torch_warns_itself
@pytest.mark.slow
@every_family
def test_the_compiled_loss_has_eagers_gradients(family):
    check_compiled(family, "inductor")


@every_model
def test_logits_do_not_depend_on_later_tokens(family, scheme):
    model = randomise(build(config_for(family, scheme)))
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=1e-6 * before.abs().max().item())
    difference = (after - before).abs().amax(dim=(0, 2))[7:]
    assert (difference > 1e-4 * before.abs().max()).all()


@torch.no_grad()
@every_model
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [7, 1, 1, 1, 1, 1], [5, 4, 3], [1, 11], [12]], ids=str)
def test_decoding_with_a_cache_gives_the_uncached_logits(family, scheme, chunks):
    model = randomise(build(config_for(family, scheme)))
    tokens, _ = batch()
    kv_heads = shape_of(config_for(family, scheme).model).num_kv_heads
    cache = KVCache(2, BATCH, kv_heads, LENGTH, 12, torch.float32)
    logits = []
    for chunk in tokens.split(chunks, dim=1):
        logits.append(model(chunk, cache))
    assert cache.length() == LENGTH
    assert_close({"logits": torch.cat(logits, dim=1)}, {"logits": model(tokens)}, 1e-5)


@torch.no_grad()
@every_family
def test_next_token_logits_are_the_ones_of_the_losss_softmax(family):
    config = config_for(family)
    parametrization = config.parametrization.model_copy(update={"hparams": {"alpha_loss_softmax": 2.5}})
    model = build(config.model_copy(update={"parametrization": parametrization}))
    tokens, targets = batch()
    log_probabilities = [
        model.next_token_logits(tokens[:, : i + 1]).log_softmax(-1).gather(-1, targets[:, i : i + 1])
        for i in range(LENGTH)
    ]
    torch.testing.assert_close(-torch.cat(log_probabilities).mean(), model.loss(tokens, targets), rtol=1e-5, atol=0)


@every_model
def test_parameters_start_with_the_plans_mean_and_deviation(family, scheme):
    big = {"hidden_size": 192, "head_dim": 48, "vocab_size": 131, "max_seq_len": 64, "num_layers": 1}
    config = config_for(family, scheme, base=96, **big)
    model, plan = build(config), plan_for(config)
    for name, parameter in model.named_parameters():
        std, mean = plan.params[name]["init_std"], plan.params[name]["init_mean"]
        if std == 0:
            assert (parameter == mean).all(), name
        else:
            assert abs(parameter.std().item() / std - 1) < 0.02, name
            assert abs(parameter.mean().item() - mean) < 0.05 * std, name


@every_family
def test_a_parameters_draw_depends_on_seed_and_name_alone(family):
    shallow, deep = (dict(build(config_for(family, num_layers=n)).named_parameters()) for n in (2, 3))
    assert shallow.keys() < deep.keys()
    assert all(torch.equal(p, deep[name]) for name, p in shallow.items())
    other_seed = dict(build(config_for(family, seed=1)).named_parameters())
    matrices = [name for name, p in shallow.items() if p.ndim == 2]
    assert not any(torch.equal(shallow[name], other_seed[name]) for name in matrices)
    draws = [shallow[name].flatten()[:100] for name in matrices]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


@every_family
def test_schemes_scale_the_same_draws(family):
    models = {scheme: (plan_for(config_for(family, scheme)), build(config_for(family, scheme))) for scheme in SCHEMES}
    for name in dict(models["sp"][1].named_parameters()):
        units = [
            model.get_parameter(name) / plan.params[name]["init_std"]
            for plan, model in models.values()
            if plan.params[name]["init_std"] > 0
        ]
        for unit in units[1:]:
            torch.testing.assert_close(unit, units[0], rtol=1e-5, atol=1e-6)


@every_model
def test_bf16_activations_keep_the_loss_and_leave_gradients_in_float32(family, scheme):
    tokens, targets = batch()
    full, half = (build(config_for(family, scheme, recipe)) for recipe in ("fp32", "bf16"))
    assert half(tokens).dtype == torch.bfloat16
    expected, loss = full.loss(tokens, targets), half.loss(tokens, targets)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 1e-2
    loss.backward()
    expected.backward()
    reference = {name: p.grad for name, p in full.named_parameters()}
    for name, parameter in half.named_parameters():
        mine, exact = parameter.grad, reference[name]
        assert mine is not None, name
        assert exact is not None, name
        assert (parameter.dtype, mine.dtype) == (torch.float32, torch.float32), name
        if not name.endswith("attn.k.bias"):
            assert F.cosine_similarity(mine.flatten(), exact.flatten(), dim=0) > 0.99, name


class PlainLayer(nn.Module):
    """A pre-norm transformer layer as any textbook writes it."""

    def __init__(self, shape, norm):
        super().__init__()
        h, kv, inner, bias = shape.hidden_size, shape.kv_size, shape.intermediate_size, shape.traits.attention_bias
        self.shape = shape
        self.llama = shape.family.name == "llama"
        self.attn = nn.ModuleDict({"norm": norm(), "q": nn.Linear(h, h, bias), "out": nn.Linear(h, h, bias)})
        self.attn.update({name: nn.Linear(h, kv, bias) for name in "kv"})
        self.mlp = nn.ModuleDict({"norm": norm(), "up": nn.Linear(h, inner, bias), "down": nn.Linear(inner, h, bias)})
        if self.llama:
            self.mlp["gate"] = nn.Linear(h, inner, bias)

    def forward(self, x):
        x = x + self.attn["out"](self.attend(self.attn["norm"](x)))
        h = self.mlp["norm"](x)
        if self.llama:
            return x + self.mlp["down"](F.silu(self.mlp["gate"](h)) * self.mlp["up"](h))
        return x + self.mlp["down"](F.gelu(self.mlp["up"](h), approximate="tanh"))

    def attend(self, h):
        b, s, c = h.shape
        d, groups = self.shape.head_dim, self.shape.num_heads // self.shape.num_kv_heads
        q, k, v = (self.attn[name](h).view(b, s, -1, d).transpose(1, 2) for name in "qkv")
        if self.llama:
            q, k = rotate_half_split(q, self.shape.rope_theta), rotate_half_split(k, self.shape.rope_theta)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        future = torch.ones(s, s, dtype=torch.bool).triu(1)
        probabilities = (q @ k.mT / d**0.5).masked_fill(future, float("-inf")).softmax(-1)
        return (probabilities @ v).transpose(1, 2).reshape(b, s, c)


def rotate_half_split(x, theta):
    """Llama's rotary embedding: pairs (j, j + d/2) as complex numbers, turned by position * theta^(-2j/d)."""
    s, d = x.shape[-2:]
    angles = torch.arange(s)[:, None] / theta ** (torch.arange(0, d, 2) / d)
    turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


class PlainDecoder(nn.Module):
    """A plain PyTorch llama or GPT-2, sharing no code with umup; its parameters have umup's names."""

    def __init__(self, shape):
        super().__init__()
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        if shape.traits.positions == "learned":
            self.positions = nn.Embedding(shape.max_seq_len, shape.hidden_size)
        norm = nn.RMSNorm if shape.family.name == "llama" else nn.LayerNorm
        self.layers = nn.ModuleList(
            PlainLayer(shape, lambda: norm(shape.hidden_size, eps=shape.norm_eps)) for _ in range(shape.num_layers)
        )
        self.norm = norm(shape.hidden_size, eps=shape.norm_eps)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.traits.tie_embeddings:
            self.head.weight = self.embed.weight

    def loss(self, tokens, targets):
        x = self.embed(tokens)
        if hasattr(self, "positions"):
            x = x + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).transpose(1, 2), targets)


@every_plain_family
def test_sp_is_the_plain_pytorch_model(family):
    config = config_for(family, "sp")
    model = randomise(build(config))
    with torch.no_grad():  # sharper than the initial 0.02, so that attention and activations matter
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    plain = PlainDecoder(shape_of(config.model))
    plain.load_state_dict(model.state_dict())
    tokens, targets = batch()
    loss, expected = model.loss(tokens, targets), plain.loss(tokens, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    mine, reference = gradients(model, loss), gradients(plain, expected)
    assert_close(mine, {name: reference[name] for name in mine}, 1e-5)


@every_family
@pytest.mark.parametrize("scheme", ["sp", "umup"])
def test_dropout_acts_while_training_only_and_in_every_place(family, scheme):
    model = build(config_for(family, scheme, dropout=0.2))
    tokens, _ = batch()
    places = [name for name, module in model.named_modules() if isinstance(module, Dropout)]
    assert places == ["dropout", *(f"layers.{i}.{branch}.dropout" for i in range(2) for branch in ("attn", "mlp"))]
    assert [m.probability for m in model.modules() if isinstance(m, Attention)] == [0.2, 0.2]
    called = []
    for name in places:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    assert not torch.equal(model(tokens), model(tokens))
    assert called == places * 2
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@every_model
def test_the_plans_microbatches_sum_to_the_gradient_of_one_batch(family, scheme):
    whole, split = (randomise(build(config_for(family, scheme, grad_accum=n))) for n in (1, 2))
    split.load_state_dict(whole.state_dict())
    tokens, targets = batch()
    whole.loss(tokens, targets).backward()
    for part in (slice(0, 2), slice(2, 4)):
        split.loss(tokens[part], targets[part]).backward()
    mine, reference = ({name: p.grad for name, p in model.named_parameters()} for model in (split, whole))
    assert_close(mine, reference, 3e-6)


def test_a_model_can_be_filled_by_a_plan_of_its_own():
    config = config_for("llama")
    shape = shape_of(config.model)
    plan = make_plan("sp", architecture(shape, 10), hparams={"sigma_init": 0.5})
    model = decoder(shape, plan)
    initialise(model, plan, 3)
    assert abs(model.embed.weight.std().item() / 0.5 - 1) < 0.05
    given = build(config.model_copy(update={"train": config.train.model_copy(update={"seed": 3})}), plan)
    assert torch.equal(given.embed.weight, model.embed.weight)
