"""FP8 on ordinary modules: formats by rule, values close to the unrounded ones, scales that follow the weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import umup
from umup.errors import ConfigError, PlanError
from umup.models.specs import plan_for
from umup.nn.fp8 import StaticMatmul, encoded

VOCAB, SEQ = 32, 16


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(width), *(nn.Linear(width, width) for _ in range(3))
        self.out_proj, self.mlp_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).view(*x.shape[:2], -1, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down_proj(F.gelu(self.up(self.mlp_norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = 64, vocab: int = VOCAB) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(vocab, width), nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids, targets):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def batch(seed: int = 0, vocab: int = VOCAB):
    return torch.randint(vocab, (2, 4, SEQ), generator=torch.Generator().manual_seed(seed)).unbind()


def scaled_net(**sizes):
    torch.manual_seed(0)
    model = Net(**sizes)
    scaled = umup.unit_scale(model, *batch(vocab=sizes.get("vocab", VOCAB)))
    return scaled, umup.plan(scaled, scheme="umup")


def optimizer_of(scaled, plan, lr=0.5):
    return torch.optim.AdamW(plan.param_groups(scaled, lr=lr))


def test_hidden_products_leave_the_stream_and_the_head_stays():
    scaled, plan = scaled_net()
    names = [name for p in umup.to_fp8(scaled, plan, backend="emulate") for name in p.names]
    assert names == [f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("q", "k", "v", "out_proj", "up", "down_proj")]
    partial, plan = scaled_net()
    spared = {f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("out_proj", "down_proj")}
    assert {n for p in umup.to_fp8(partial, plan, "fp8_partial", backend="emulate") for n in p.names} == set(
        names
    ) - spared
    head, plan = scaled_net()
    assert "head" in {n for p in umup.to_fp8(head, plan, "fp8_head", backend="emulate") for n in p.names}


def test_rounding_is_all_that_changes():
    """A format of 10 mantissa bits is the module itself; E4M3 is near it, in loss and in every gradient."""
    scaled, plan = scaled_net()
    fine, coarse = copy.deepcopy(scaled), copy.deepcopy(scaled)
    umup.to_fp8(fine, plan, "simulate:E8M10")
    umup.to_fp8(coarse, plan, backend="emulate")
    for other, within in ((fine, 2e-3), (coarse, 0.2)):
        grads = []
        for model in (scaled, other):
            model.zero_grad()
            loss = model(*batch())
            loss.backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        for name, exact in grads[0].items():
            if name.endswith("k.bias"):  # adds one number to all logits of a query: its gradient is zero
                continue
            error = (grads[1][name] - exact).norm() / exact.norm()
            assert error < within, name
            assert other is fine or error > 1e-4, name


def test_weights_are_encoded_anew_after_steps_and_loads():
    scaled, plan = scaled_net()
    products = umup.to_fp8(scaled, plan, backend="emulate")
    optimizer = optimizer_of(scaled, plan)
    keeper = umup.ScaleKeeper(scaled, mode="adapt", every=2)
    keeper.follow(optimizer)
    losses = []
    for step in range(30):
        if keeper.due(step):
            keeper.look(step, scaled, *batch())
        loss = scaled(*batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    for p in products:
        weight = p.matmul.row.float() * 2.0 ** -p.matmul.exponents[2]
        torch.testing.assert_close(weight, p.weights[0].detach(), rtol=0.07, atol=0.02)
    state = {name: 2 * tensor for name, tensor in scaled.state_dict().items()}
    scaled.load_state_dict(state)
    assert not torch.equal(products[0].matmul.row.float() * 2.0 ** -products[0].matmul.exponents[2], weight)


def test_the_state_dict_and_copies_know_nothing_of_it():
    scaled, plan = scaled_net()
    keys = list(scaled.state_dict())
    umup.to_fp8(scaled, plan, backend="emulate")
    assert list(scaled.state_dict()) == keys
    other = copy.deepcopy(scaled)
    assert other(*batch()).item() == scaled(*batch()).item()
    assert encoded(other)[0].matmul is not encoded(scaled)[0].matmul
    with torch.no_grad():
        other.module.blocks[0].q.matmul.row.zero_()
    assert other(*batch()).item() != scaled(*batch()).item()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises some of its own
def test_compiled_like_eager():
    scaled, plan = scaled_net()
    umup.to_fp8(scaled, plan, backend="emulate")
    expected = scaled(*batch())
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    loss = compiled(*batch())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    compiled_grad = scaled.module.blocks[1].up.weight.grad.clone()
    scaled.zero_grad()
    scaled(*batch()).backward()
    torch.testing.assert_close(compiled_grad, scaled.module.blocks[1].up.weight.grad)


def test_modules_of_umup_nn_take_it_too():
    config = umup.load_config("recipes/llama-tiny-umup.yaml")
    plan, model = plan_for(config), umup.build(config)
    found = umup.to_fp8(model, plan, backend="emulate")
    assert all(isinstance(p.matmul, StaticMatmul) for p in found)
    assert len(found) == 4 * config.model.num_layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": {"blocks.*.qq": "bf16"}}, "no product has such a name"),
        ({"recipe": "fp9"}, "unknown recipe 'fp9'"),
        ({"backend": "auto"}, "FP8 products need a GPU"),
    ],
)
def test_bad_input(arguments, message):
    scaled, plan = scaled_net()
    if torch.cuda.is_available() and "GPU" in message:
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=message):
        umup.to_fp8(scaled, plan, **{"backend": "emulate", **arguments})


def test_what_is_not_unit_scaled_is_refused():
    model = Net()
    with pytest.raises(PlanError, match=r"umup\.unit_scale"):
        umup.plan(model, scheme="umup")
    plan = umup.plan(model, base=lambda: Net(32), scheme="mup")
    with pytest.raises(ConfigError, match="unit-scaled schemes only"):
        umup.to_fp8(model, plan, backend="emulate")


def test_odd_sides_are_refused_by_name():
    scaled, plan = scaled_net(vocab=33)
    with pytest.raises(ConfigError, match="head maps 64 features to 33"):
        umup.to_fp8(scaled, plan, "fp8_head", backend="emulate")
