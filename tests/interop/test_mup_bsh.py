"""microsoft/mup's files as a plan's base: its groups, its training run, and one line for what is wrong."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import umup
from umup.adapt.discover import discover
from umup.errors import ConfigError, PlanError
from umup.interop.mup_bsh import base_model, read_base_shapes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mup

VOCAB, BASE, WIDTH, LR, DECAY = 11, 16, 64, 0.01, 0.1


class Net(nn.Module):
    """Embedding, position, norm, two hidden matrices of unlike fans, a head made by `readout`."""

    def __init__(self, width, readout=nn.Linear):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.head = readout(width, VOCAB)

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.cross_entropy(self.head(x), targets)


def write(path, make=Net, base=BASE, delta=2 * BASE):
    mup.make_base_shapes(make(base), make(delta), savefile=str(path))
    return path


@pytest.fixture
def bsh(tmp_path):
    return write(tmp_path / "base.bsh")


@pytest.fixture
def reference(bsh):
    """mup's own model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mup.set_base_shapes(Net(WIDTH, mup.MuReadout), str(bsh))


def test_file_is_read(bsh):
    shapes = read_base_shapes(bsh)
    assert shapes["embed.weight"] == (None, BASE)
    assert shapes["up.weight"] == (3 * BASE, BASE)
    assert shapes["head.bias"] == (None,)
    assert list(shapes) == [n for n, _ in sorted(Net(WIDTH).named_parameters())]


def test_base_has_the_files_shapes_and_no_memory(bsh):
    model = Net(WIDTH)
    base = base_model(model, bsh)
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in Net(BASE).named_parameters()}
    assert all(p.is_meta for p in base.parameters())
    assert not any(p.is_meta for p in model.parameters())


def numbers(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_groups_are_mup_adams(reference, bsh):
    model = Net(WIDTH)
    # The table's form, in which the head's multiplier is in the forward, as in MuReadout.
    plan = umup.plan(model, base=base_model(model, bsh), independent_weight_decay=False).plan
    theirs = numbers(mup.MuAdam(reference.parameters(), lr=LR, weight_decay=DECAY), reference)
    assert theirs.keys() == plan.params.keys()
    for name, (lr, decay) in theirs.items():
        assert LR * plan.params[name]["lr"] == pytest.approx(lr, rel=1e-12), name
        if name.endswith("weight") and name != "norm.weight":  # mup decays gains and biases, too
            assert DECAY * plan.params[name]["weight_decay"] == pytest.approx(decay, rel=1e-12), name
    assert plan.params["head.weight"]["multiplier"] == pytest.approx(BASE / WIDTH, rel=1e-12)


def test_run_is_mups(reference, bsh):
    """From the same function, mup's MuReadout under MuAdam and nn.Linear under the folded plan stay the same."""
    reference = reference.double()
    model = Net(WIDTH).double()
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        model.head.weight *= BASE / WIDTH
    plan = umup.plan(model, base=base_model(model, bsh))
    ours = torch.optim.AdamW(plan.param_groups(model, lr=LR, eps=1e-30))
    theirs = mup.MuAdam(reference.parameters(), lr=LR, eps=1e-30)
    tokens, targets = torch.randint(VOCAB, (2, 200))
    losses = []
    for _ in range(10):
        losses.append([])
        for net, optimizer in ((model, ours), (reference, theirs)):
            loss = net(tokens, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[-1][0] < losses[0][0] - 0.1
    for mine, other in losses:
        assert mine == pytest.approx(other, rel=1e-9)


def test_init_after_apply_is_mups(bsh):
    """Both rescale torch's default init: the same draw ends up as the same function."""
    torch.manual_seed(1)
    model = Net(WIDTH)
    twin = Net(WIDTH, mup.MuReadout)
    twin.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mup.set_base_shapes(twin, str(bsh))
    umup.plan(model, base=base_model(model, bsh)).apply(model)
    tokens, targets = torch.randint(VOCAB, (2, 200))
    for name in ("up.weight", "up.bias", "down.weight", "embed.weight"):
        torch.testing.assert_close(model.get_parameter(name), twin.get_parameter(name))
    torch.testing.assert_close(model.head.weight, twin.head.weight * BASE / WIDTH)
    torch.testing.assert_close(model(tokens, targets), twin(tokens, targets))


def test_tied_weights_stay_tied(tmp_path):
    def tied(width):
        net = Net(width)
        net.head.weight = net.embed.weight
        return net

    model = tied(WIDTH)
    base = base_model(model, write(tmp_path / "tied.bsh", tied))
    assert base.head.weight is base.embed.weight
    assert {p.name: p.role for p in discover(model, base).params}["head.weight"] == "tied_readout"


def test_sizes_that_modules_keep_follow(tmp_path):
    class Mixed(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, width)
            self.lstm = nn.LSTM(width, width, proj_size=width // 2)
            self.attn = nn.MultiheadAttention(width // 2, width // 8)
            self.cell = nn.GRUCell(width // 2, width)

    model = Mixed(WIDTH)
    base = base_model(model, write(tmp_path / "mixed.bsh", Mixed))
    assert (base.lstm.hidden_size, base.attn.embed_dim, base.cell.hidden_size) == (BASE, BASE // 2, BASE)
    plan, honest = umup.plan(model, base=base), umup.plan(model, base=Mixed(BASE))
    rates = {name: p["lr"] for name, p in plan.plan.params.items()}
    assert rates == {name: p["lr"] for name, p in honest.plan.params.items()}


def test_data_parallel_prefix_is_taken_off(bsh, tmp_path):
    text = bsh.read_text()
    names = read_base_shapes(bsh)
    for name in names:
        text = text.replace(f"\n{name}:", f"\nmodule.{name}:")
    (tmp_path / "wrapped.bsh").write_text(text)
    assert read_base_shapes(tmp_path / "wrapped.bsh") == names


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("up.weight:", "upper.weight:", "'up.weight' is not in the file; did you mean 'upper.weight'?"),
        ("\nup.bias:", "\nmore: [1]\nup.bias:", "'more' is no parameter of the model"),
        ("up.weight:\n", "up.weight:\n- 3\n", "up.weight has 3 sides there and 2 here"),
    ],
)
def test_files_of_another_model_are_refused(bsh, old, new, message):
    bsh.write_text(bsh.read_text().replace(old, new))
    with pytest.raises(PlanError) as error:
        base_model(Net(WIDTH), bsh)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not YAML"),
        ("a: 3", "a: expected a list of sizes and nulls, found 3"),
        ("a: [true]", "expected a list of sizes and nulls"),
        ("a: [-4]", "expected a list of sizes and nulls"),
        ("[1, 2]", "found no names"),
        ("", "found no names"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "broken.bsh").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_base_shapes(tmp_path / "broken.bsh")
    assert message in str(error.value)
    assert "broken.bsh" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_binary_files_are_refused(tmp_path):
    (tmp_path / "binary.bsh").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.bsh", "binary.bsh"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_base_shapes(tmp_path / name)


def test_mu_readout_is_refused(bsh, reference):
    with pytest.raises(PlanError, match=r"head \(MuReadout\) is mup's readout: it divides by the width.*nn\.Linear"):
        umup.plan(reference, base=base_model(copy.deepcopy(reference), bsh))
