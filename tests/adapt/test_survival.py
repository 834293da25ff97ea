"""What a plan did outlives everything that people do to a model: copies, files, wrappers, shards, compilers.

The network has both kinds of hooks: a tied head, and fused attention whose head size grows.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import umup
from umup.adapt.inits import measure
from umup.errors import PlanError

# The decay is large so that its effect is seen.
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay. independent decay")
VOCAB, BATCH, SEQ, STEPS = 33, 8, 8, 3  # an odd number of rows shards unevenly
no_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises some of its own


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = Attention(width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.num_heads, self.head_dim = 2, width // 2
        self.norm, self.c_attn, self.c_proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.c_attn(self.norm(x)).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class GPT(nn.Module):
    def __init__(self, width, layers=2):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)
        self.tie()

    def tie(self):
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def build():
    """The model, its plan not yet applied."""
    torch.manual_seed(0)
    model = GPT(32).double()
    return model, umup.plan(model, lambda: GPT(8, 1), scheme="completep")


def applied():
    model, plan = build()
    assert len(plan.apply(model).installed) == 3
    return model, plan


def tokens():
    return torch.randint(VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(4))


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def optimizer_of(plan, model):
    return torch.optim.AdamW(plan.param_groups(model, lr=0.01, weight_decay=0.1, eps=1e-3), foreach=False)


def train(model, optimizer, steps=STEPS, ids=None):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, tokens() if ids is None else ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def reference():
    """Losses of an undisturbed run, and the model after it."""
    model, plan = applied()
    return train(model, optimizer_of(plan, model)), model


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_hooks_are_not_idle():
    model, _ = applied()
    found = [loss_of(model, tokens()).item()]
    for hooks_of in ("_forward_hooks", "_forward_pre_hooks"):
        for module in model.modules():
            vars(module)[hooks_of].clear()
        found.append(loss_of(model, tokens()).item())
    assert len({round(loss, 6) for loss in found}) == 3


@no_warnings
@pytest.mark.parametrize("wrapped", [False, True], ids=["groups of the model", "groups of the compiled"])
def test_torch_compile(wrapped):
    model, plan = applied()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = train(compiled, optimizer_of(plan, compiled if wrapped else model))
    assert losses == pytest.approx(reference()[0], rel=1e-12)


@pytest.mark.slow
@no_warnings
def test_torch_compile_to_machine_code():
    model, plan = applied()
    # float32: torch 2.11 has no backward pass of double attention there.
    compiled = torch.compile(model.float(), fullgraph=True)
    assert train(compiled, optimizer_of(plan, compiled)) == pytest.approx(reference()[0], rel=1e-4)


def test_deepcopy():
    model, plan = applied()
    twin = copy.deepcopy(model)
    assert hooks(twin) == hooks(model) == 3
    assert train(twin, optimizer_of(plan, twin)) == reference()[0]
    assert train(model, optimizer_of(plan, model)) == reference()[0]


def test_pickle_of_the_plan_and_of_the_model():
    model, plan = pickle.loads(pickle.dumps(applied()))
    assert train(model, optimizer_of(plan, model)) == reference()[0]


def test_torch_save_and_safetensors(tmp_path):
    model, plan = applied()
    optimizer = optimizer_of(plan, model)
    train(model, optimizer, 1)
    memory = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, memory)
    save_model(model, str(tmp_path / "model.safetensors"))
    memory.seek(0)
    state = torch.load(memory)

    def resumed(load):
        other, again = applied()
        load(other)
        own = optimizer_of(again, other)
        own.load_state_dict(copy.deepcopy(state["optimizer"]))
        return train(other, own, STEPS - 1)

    assert resumed(lambda m: m.load_state_dict(state["model"])) == reference()[0][1:]
    assert resumed(lambda m: load_model(m, str(tmp_path / "model.safetensors"))) == reference()[0][1:]


def test_assigned_state_with_the_groups_made_anew():
    model, plan = applied()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.load_state_dict(state, assign=True)
    with pytest.raises(PlanError, match=r"head\.weight was tied to embed\.weight and is not any more .*assign=True"):
        optimizer_of(plan, model)
    model.tie()
    assert train(model, optimizer_of(plan, model)) == reference()[0]


def test_meta_device_then_memory_then_init():
    model, plan = build()
    start = copy.deepcopy(model.state_dict())
    with torch.device("meta"):
        empty = GPT(32).double()
    assert umup.plan(empty, lambda: GPT(8, 1), scheme="completep") == plan
    empty.to_empty(device="cpu")
    with pytest.raises(PlanError, match="to_empty"):
        plan.apply(empty)
    empty.tie()
    for module in empty.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding):
            module.reset_parameters()
    empty.load_state_dict(start)
    plan.apply(empty)
    assert train(empty, optimizer_of(plan, empty)) == reference()[0]


def test_gradient_accumulation():
    model, plan = applied()
    optimizer = optimizer_of(plan, model)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        parts = [loss_of(model, part) / 4 for part in tokens().chunk(4)]
        for part in parts:
            part.backward()
        optimizer.step()
        losses.append(sum(part.item() for part in parts))
    assert losses == pytest.approx(reference()[0], rel=1e-12)


# --- two processes -------------------------------------------------------------------------------------------------


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def applied_then_sharded():
    model, plan = applied()
    return shard(model), plan


def sharded_then_applied():
    model, plan = build()
    shard(model)
    plan.apply(model)
    return model, plan


def applied_then_ddp():
    model, plan = applied()
    return DistributedDataParallel(model), plan


def partly_frozen():
    model, plan = applied()
    model.layers[1].requires_grad_(False)
    return shard(model), plan


WRAPPED = {f.__name__: f for f in (applied_then_sharded, sharded_then_applied, applied_then_ddp, partly_frozen)}


def measured(model):
    samples = measure([p.spec for p in build()[1].folded.stored.values()], dict(model.named_parameters()))
    return {name: (s.std, s.ends, s.elements) for name, s in samples.items()}


def on_a_rank(rank, folder, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name in names:
        model, plan = WRAPPED[name]()
        optimizer = optimizer_of(plan, model)
        plan.guard(optimizer)
        losses = train(model, optimizer, ids=tokens().chunk(2)[rank])
        whole = {n.removeprefix("module."): t for n, t in model.state_dict().items()}
        whole = {n: t.full_tensor() if isinstance(t, dist.tensor.DTensor) else t for n, t in whole.items()}
        found[name] = losses, whole, hooks(model)
    found["measured"] = measured(shard(build()[0]))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_a_rank, (str(folder), list(WRAPPED)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", WRAPPED)
def test_two_processes_train_like_one(two_processes, name):
    if name == "partly_frozen":
        model, plan = applied()
        model.layers[1].requires_grad_(False)
        losses = train(model, optimizer_of(plan, model))
    else:
        losses, model = reference()
    (first, state, count), (second, _, _) = (rank[name] for rank in two_processes)
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(losses, rel=1e-12)
    assert state.keys() == model.state_dict().keys()
    assert "umup_plan" in state
    for key, value in model.state_dict().items():
        assert torch.allclose(state[key].double(), value.double(), rtol=1e-12, atol=1e-12), key
    assert count >= 3


def test_shards_are_measured_as_a_whole(two_processes):
    """What a rank sees of its own part would let ranks decide differently."""
    alone = measured(build()[0])
    for rank in two_processes:
        assert rank["measured"].keys() == alone.keys()
        for name, numbers in alone.items():
            assert rank["measured"][name] == pytest.approx(numbers, rel=1e-12), name
