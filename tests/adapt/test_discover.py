"""Roles and fans of plain torch modules: what growth shows, what names show, what is refused."""

from time import perf_counter

import pytest
import torch
from torch import nn

from umup.adapt.discover import discover
from umup.config.load import parse_config
from umup.errors import PlanError
from umup.models.build import decoder
from umup.models.specs import decoder_specs, plan_for, shape_of
from umup.rules.roles import Role

VOCAB, CONTEXT = 101, 10


class Attention(nn.Module):
    """Fused nanoGPT attention; the head size follows from two attributes."""

    def __init__(self, width, heads):
        super().__init__()
        self.n_embd, self.n_head = width, heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout())


class GPT(nn.Module):
    """The head is registered before the embedding, as some codes do."""

    def __init__(self, width, layers=2, heads=2, tied=False, vocab=VOCAB, head_first=False):
        super().__init__()
        if head_first:
            self.lm_head = nn.Linear(width, vocab, bias=False)
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(CONTEXT, width)
        self.h = nn.ModuleList([Layer(width, heads) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = getattr(self, "lm_head", None) or nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


def on_meta(make, *args, **kwargs):
    with torch.device("meta"):
        return make(*args, **kwargs)


def found(make, target, base, overrides=None):
    """Specs by name, and the Discovery, of `make` at two argument dicts or widths."""
    both = [on_meta(make, **a) if isinstance(a, dict) else on_meta(make, a) for a in (target, base)]
    discovery = discover(*both, overrides=overrides)
    assert [s.name for s in discovery.params] == [s.name for s in discovery.base]
    return {s.name: s for s in discovery.params}, discovery


def fans(spec):
    return spec.role.value, spec.fan_in, spec.fan_out


def roles_of(make, target, base, overrides=None):
    return {name: spec.role.value for name, spec in found(make, target, base, overrides)[0].items()}


class TestGPT:
    @pytest.fixture
    def specs(self):
        return found(GPT, 64, 16)[0]

    def test_roles_and_fans(self, specs):
        assert fans(specs["wte.weight"]) == ("embedding", VOCAB, 64)
        assert fans(specs["wpe.weight"]) == ("position", CONTEXT, 64)
        assert fans(specs["h.0.ln_1.weight"]) == ("norm_gain", 64, 64)
        assert fans(specs["h.0.ln_1.bias"]) == ("norm_bias", 64, 64)
        assert fans(specs["h.0.ln_2.weight"]) == ("norm_gain", 64, 64)
        assert fans(specs["h.0.attn.c_attn.weight"]) == ("hidden", 64, 64)
        assert fans(specs["h.0.attn.c_attn.bias"]) == ("bias", 64, 64)
        assert fans(specs["h.0.attn.c_proj.weight"]) == ("hidden_out", 64, 64)
        assert fans(specs["h.1.mlp.0.weight"]) == ("hidden", 64, 256)
        assert fans(specs["h.1.mlp.2.weight"]) == ("hidden_out", 256, 64)
        assert fans(specs["h.1.mlp.2.bias"]) == ("bias", 256, 64)
        assert fans(specs["ln_f.weight"]) == ("norm_gain", 64, 64)
        assert fans(specs["lm_head.weight"]) == ("readout", 64, VOCAB)

    def test_residual_marks_are_those_of_the_blocks(self, specs):
        assert all(spec.on_residual == name.startswith("h.") for name, spec in specs.items())

    def test_base_fans_are_those_of_the_base(self):
        _, d = found(GPT, 64, 16)
        base = {s.name: s for s in d.base}
        assert fans(base["h.1.mlp.2.weight"]) == ("hidden_out", 64, 16)
        assert base["h.1.mlp.2.weight"].shape == (16, 64)
        assert (d.num_layers, d.base_num_layers, d.compared, d.unwritten) == (2, 2, True, ())

    def test_fused_weights_name_their_parts(self):
        _, d = found(GPT, 64, 16)
        assert d.fused == {f"h.{i}.attn.c_attn.{leaf}": 3 for i in range(2) for leaf in ("weight", "bias")}

    def test_head_sizes_that_differ_are_reported(self):
        _, d = found(GPT, 64, 16)
        assert d.head_dims == {"h.0.attn": (32, 8), "h.1.attn": (32, 8)}
        _, d = found(GPT, {"width": 64, "heads": 8}, {"width": 16, "heads": 2})
        assert d.head_dims == {}

    def test_a_wider_base_is_allowed(self):
        assert {n: s.role for n, s in found(GPT, 16, 64)[0].items()} == {
            n: s.role for n, s in found(GPT, 64, 16)[0].items()
        }

    def test_a_smaller_vocabulary_in_the_base_is_no_width(self):
        specs, _ = found(GPT, 64, {"width": 16, "vocab": 31})
        assert specs["lm_head.weight"].role is Role.READOUT

    @pytest.mark.parametrize("head_first", [False, True])
    def test_a_tied_head_belongs_to_the_embedding(self, head_first):
        size = {"tied": True, "head_first": head_first}
        specs, _ = found(GPT, {"width": 64, **size}, {"width": 16, **size})
        assert fans(specs["lm_head.weight"]) == ("tied_readout", 64, VOCAB)
        assert specs["lm_head.weight"].tied_to == "wte.weight"
        assert (specs["wte.weight"].role, specs["wte.weight"].tied_to) == (Role.EMBEDDING, None)


class TestDepth:
    @pytest.mark.parametrize(("layers", "base_layers"), [(5, 2), (2, 5), (4, 1), (1, 4)])
    def test_depths_may_differ(self, layers, base_layers):
        specs, d = found(GPT, {"width": 64, "layers": layers}, {"width": 16, "layers": base_layers})
        assert (d.num_layers, d.base_num_layers) == (layers, base_layers)
        last = f"h.{layers - 1}.attn.c_proj.weight"
        assert fans(specs[last]) == ("hidden_out", 64, 64)
        assert fans({s.name: s for s in d.base}[last]) == ("hidden_out", 16, 16)
        assert len(d.head_dims) == layers

    def test_only_depth_differs(self):
        _, d = found(GPT, {"width": 64, "layers": 3}, {"width": 64, "layers": 1})
        assert not d.compared
        assert [s.role for s in d.params] == [s.role for s in found(GPT, {"width": 64, "layers": 3}, 16)[1].params]

    def test_a_block_the_base_lacks_is_read_at_one_that_has_its_parameters(self):
        class Mixed(nn.Module):
            def __init__(self, width, depth):
                super().__init__()
                self.blocks = nn.ModuleList([Layer(width, 2) for _ in range(depth)])
                for block in self.blocks[::2]:
                    block.extra = nn.Linear(width, 2 * width)

        _, d = found(Mixed, {"width": 64, "depth": 5}, {"width": 16, "depth": 2})
        assert {s.name: s for s in d.base}["blocks.4.extra.weight"].shape == (32, 16)

    def test_of_several_such_blocks_it_is_the_last(self):
        def stage(width, depth):
            """The first block widens the stream, as in a ResNet's stage."""
            first = Layer(width, 2)
            first.attn.c_attn = nn.Linear(width // 2, width)
            return nn.ModuleList([first, *(Layer(width, 2) for _ in range(depth - 1))])

        _, d = found(stage, {"width": 64, "depth": 4}, {"width": 16, "depth": 2})
        base = {s.name: s for s in d.base}
        assert base["0.attn.c_attn.weight"].shape == (16, 8)
        assert base["3.attn.c_attn.weight"].shape == (48, 16)

    def test_heads_within_blocks_are_no_layers(self):
        class Head(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.query = nn.Linear(width, 4, bias=False)

        class Block(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.heads = nn.ModuleList([Head(width) for _ in range(width // 4)])
                self.norm, self.proj = nn.LayerNorm(width), nn.Linear(width, width)

        specs, d = found(lambda width: nn.Sequential(*[Block(width) for _ in range(3)]), 16, 16)
        assert d.num_layers == 3
        assert specs["0.heads.1.query.weight"].role is Role.HIDDEN
        assert specs["2.proj.weight"].role is Role.HIDDEN_OUT

    def test_branches_of_one_wrapper_class_are_not_layers_of_their_own(self):
        class PreNorm(nn.Module):
            def __init__(self, width, inner):
                super().__init__()
                self.norm, self.fn = nn.LayerNorm(width), inner

        class Net(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.layers = nn.ModuleList(
                    nn.ModuleList([PreNorm(width, Attention(width, 2)), PreNorm(width, Layer(width, 2).mlp)])
                    for _ in range(3)
                )

        specs, d = found(Net, 64, 16)
        assert d.num_layers == 3
        assert specs["layers.2.1.fn.2.weight"].role is Role.HIDDEN_OUT

    def test_stages_of_blocks_count_their_blocks(self):
        def stages(width):
            return nn.ModuleList([nn.ModuleList([Layer(width, 2) for _ in range(n)]) for n in (2, 3)])

        _, d = found(stages, 64, 16)
        assert d.num_layers == 5

    def test_blocks_in_which_nothing_is_named_like_a_writer_are_reported(self):
        class Odd(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.norm, self.one, self.two = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

        _, d = found(lambda width: nn.ModuleList([Odd(width), Odd(width)]), 64, 16)
        assert (d.num_layers, d.unwritten) == (2, ("0", "1"))

    def test_a_writers_name_needs_a_writers_shape(self):
        class Block(nn.Module):
            """`w2` is a gate here, `c_proj` writes (the first Qwen)."""

            def __init__(self, width):
                super().__init__()
                self.norm, self.w2 = nn.LayerNorm(width), nn.Linear(width, 3 * width)
                self.c_proj = nn.Linear(3 * width, width)

        roles = roles_of(lambda width: nn.ModuleList([Block(width), Block(width)]), 64, 16)
        assert (roles["0.w2.weight"], roles["0.c_proj.weight"]) == ("hidden", "hidden_out")


def test_torch_encoder_and_decoder_layers():
    def make(width):
        return nn.Transformer(width, 4, 2, 3, 4 * width, batch_first=True)

    specs, d = found(make, 64, 16)
    assert d.num_layers == 5
    assert fans(specs["encoder.layers.0.self_attn.in_proj_weight"]) == ("hidden", 64, 64)
    assert fans(specs["encoder.layers.0.self_attn.in_proj_bias"]) == ("bias", 64, 64)
    assert specs["encoder.layers.0.self_attn.in_proj_weight"].shape == (192, 64)
    for name in ("encoder.layers.1.self_attn.out_proj", "decoder.layers.2.multihead_attn.out_proj"):
        assert fans(specs[f"{name}.weight"]) == ("hidden_out", 64, 64)
    assert fans(specs["decoder.layers.0.linear1.weight"]) == ("hidden", 64, 256)
    assert fans(specs["decoder.layers.0.linear2.weight"]) == ("hidden_out", 256, 64)
    assert d.head_dims["decoder.layers.0.multihead_attn"] == (16, 4)


def test_separate_projections_of_multihead_attention():
    specs, _ = found(lambda w: nn.MultiheadAttention(w, 4, kdim=24, vdim=2 * w, add_bias_kv=True), 64, 16)
    assert fans(specs["q_proj_weight"]) == ("hidden", 64, 64)
    assert fans(specs["k_proj_weight"]) == ("input", 24, 64)
    assert fans(specs["v_proj_weight"]) == ("hidden", 128, 64)
    assert fans(specs["bias_k"]) == ("bias", 1, 64)


def test_convolutions_count_their_taps():
    def net(width):
        return nn.Sequential(
            nn.Conv2d(3, width, 5),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 3, groups=width),
            nn.Conv2d(width, 2 * width, 3, groups=2),
            nn.GroupNorm(2, 2 * width),
            nn.ConvTranspose2d(2 * width, width, 4, groups=2),
            nn.Conv2d(width, 3, 1),
        )

    specs, d = found(net, 64, 16)
    assert fans(specs["0.weight"]) == ("input", 75, 64)
    assert fans(specs["1.weight"]) == ("norm_gain", 64, 64)
    assert fans(specs["2.weight"]) == ("input", 9, 64)
    assert fans(specs["3.weight"]) == ("hidden", 32 * 9, 128)
    assert fans(specs["4.bias"]) == ("norm_bias", 128, 128)
    assert fans(specs["5.weight"]) == ("hidden", 64 * 16, 64)
    assert fans(specs["5.bias"]) == ("bias", 64 * 16, 64)
    assert fans(specs["6.weight"]) == ("readout", 64, 3)
    assert d.num_layers == 0


def test_gates_of_an_rnn_are_parts():
    specs, d = found(lambda w: nn.LSTM(7, w, num_layers=2), 64, 16)
    assert fans(specs["weight_ih_l0"]) == ("input", 7, 64)
    assert fans(specs["weight_hh_l0"]) == ("hidden", 64, 64)
    assert fans(specs["bias_ih_l0"]) == ("bias", 7, 64)
    assert fans(specs["weight_ih_l1"]) == ("hidden", 64, 64)
    assert d.fused["weight_hh_l1"] == 4


def test_multi_query_keeps_the_whole_of_its_fused_weight():
    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm, self.c_attn = nn.LayerNorm(width), nn.Linear(width, width + 8)
            self.c_proj = nn.Linear(width, width)

    specs, d = found(lambda w: nn.ModuleList([Block(w), Block(w)]), 64, 16)
    assert fans(specs["0.c_attn.weight"]) == ("hidden", 64, 72)
    assert d.fused == {}


class Raw(nn.Module):
    """One raw parameter, beside a norm by which the widths can be compared."""

    def __init__(self, name, shape, width):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.norm = nn.LayerNorm(width)


def raw(name, target, base):
    sizes = {"name": name, "shape": target, "width": 64}, {"name": name, "shape": base, "width": 16}
    return lambda overrides=None: found(Raw, *sizes, overrides)[0][name]


@pytest.mark.parametrize(
    ("name", "target", "base", "expected"),
    [
        ("cls_token", (1, 1, 64), (1, 1, 16), ("bias", 1, 64)),
        ("pos_embed", (1, 17, 64), (1, 17, 16), ("position", 17, 64)),
        ("pos_embed", (1, 26, 64), (1, 17, 16), ("position", 26, 64)),
        ("pos_embed", (1, 64, 3, 4), (1, 16, 3, 4), ("position", 12, 64)),
        ("register_tokens", (1, 4, 64), (1, 4, 16), ("position", 4, 64)),
        ("gamma", (64, 1, 1), (16, 1, 1), ("norm_gain", 64, 64)),
        ("logit_scale", (), (), ("scalar", 1, 1)),
        ("slopes", (8,), (8,), ("scalar", 8, 8)),
        ("mixing", (3, 5), (3, 5), ("scalar", 15, 15)),
        ("pos_embed", (3, 5), (3, 5), ("scalar", 15, 15)),
        ("relative_bias_table", (49, 64), (49, 16), ("bias", 1, 64)),
        ("kernel", (64, 64), (16, 16), ("hidden", 64, 64)),
    ],
)
def test_raw_parameters(name, target, base, expected):
    assert fans(raw(name, target, base)()) == expected


@pytest.mark.parametrize(
    ("role", "target", "base", "expected"),
    [
        ("input", (5, 64), (5, 16), ("input", 5, 64)),
        ("input", (64, 5), (16, 5), ("input", 5, 64)),
        ("readout", (5, 64), (5, 16), ("readout", 64, 5)),
        ("readout", (64, 5), (16, 5), ("readout", 64, 5)),
        ("position", (5, 64), (5, 16), ("position", 5, 64)),
        ("hidden", (64, 128), (16, 32), ("hidden", 128, 64)),
        ("hidden_out", (1, 64, 128), (1, 16, 32), ("hidden_out", 128, 64)),
    ],
)
def test_undecided_raw_parameters_name_the_override_that_decides(role, target, base, expected):
    specs = raw("thing", target, base)
    with pytest.raises(PlanError, match=r"thing, \(.*\) here and \(.*\) in the base.*overrides=\{'thing': '\w+'\}"):
        specs()
    assert fans(specs({"thing": role})) == expected


def test_a_raw_stack_of_matrices_cannot_be_hidden():
    with pytest.raises(PlanError, match="thing: hidden cannot be read off"):
        raw("thing", (8, 64, 64), (8, 16, 16))({"thing": "hidden"})


class TestOverrides:
    def test_the_last_match_wins(self):
        roles = roles_of(GPT, 64, 16, {"h.*.c_attn.weight": "hidden_out", "h.1.attn.c_attn.weight": "input"})
        assert roles["h.0.attn.c_attn.weight"] == "hidden_out"
        assert roles["h.1.attn.c_attn.weight"] == "input"
        assert roles["h.1.attn.c_attn.bias"] == "bias"

    def test_what_is_wrong_is_named(self):
        with pytest.raises(PlanError, match=r"overrides\['h.*'\]: unknown role 'hiden'; did you mean 'hidden'"):
            found(GPT, 64, 16, {"h.*": "hiden"})
        with pytest.raises(PlanError, match=r"overrides\['x.*'\] matches no parameter; names look like 'wte.weight'"):
            found(GPT, 64, 16, {"x.*": "hidden"})
        with pytest.raises(PlanError, match="unknown role 'tied_readout'"):
            found(GPT, 64, 16, {"lm_head.weight": "tied_readout"})


class TestSharedStorage:
    def test_layers_of_one_role_may_share(self):
        def make(width):
            first, second = Layer(width, 2), Layer(width, 2)
            second.attn.c_attn.weight = first.attn.c_attn.weight
            return nn.ModuleList([first, second])

        specs, _ = found(make, 64, 16)
        shared = specs["1.attn.c_attn.weight"]
        assert (shared.role, shared.tied_to) == (Role.HIDDEN, "0.attn.c_attn.weight")

    def test_one_module_used_twice_has_every_name(self):
        def make(width):
            layer = Layer(width, 2)
            return nn.ModuleList([layer, layer])

        specs, d = found(make, 64, 16)
        assert d.num_layers == 2
        assert specs["1.mlp.0.bias"].tied_to == "0.mlp.0.bias"

    def test_a_raw_use_is_read_as_the_module_that_knows_it(self):
        class Head(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.norm, self.offset = nn.LayerNorm(width), nn.Parameter(torch.empty(7))
                self.decoder = nn.Linear(width, 7)
                self.decoder.bias = self.offset

        specs, _ = found(Head, 64, 16)
        assert fans(specs["offset"]) == ("bias", 64, 7)
        assert fans(specs["decoder.bias"]) == ("bias", 64, 7)

    def test_two_roles_are_refused_by_name(self):
        def make(width):
            layer = Layer(width, 2)
            layer.attn.c_proj.weight = nn.Parameter(torch.empty(width, width))
            layer.extra = nn.Linear(width, width)
            layer.extra.weight = layer.attn.c_proj.weight
            return nn.ModuleList([layer, Layer(width, 2)])

        message = r"0.extra.weight \(hidden\) shares its storage with 0.attn.c_proj.weight \(hidden_out\)"
        with pytest.raises(PlanError, match=message):
            found(make, 64, 16)

    def test_the_same_role_inside_and_outside_a_block_is_refused(self):
        def make(width):
            net = nn.ModuleDict({"h": nn.ModuleList([Layer(width, 2), Layer(width, 2)]), "top": nn.LayerNorm(width)})
            net["top"].weight = net["h"][0].ln_1.weight
            return net

        with pytest.raises(PlanError, match=r"top\.weight"):
            found(make, 64, 16)

    @pytest.mark.parametrize("device", ["meta", "cpu"])
    def test_overlapping_parameters_are_refused(self, device):
        with torch.device(device):
            net = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 4, bias=False)})
            net["b"].weight = nn.Parameter(net["a"].weight.detach()[2:6])
        with pytest.raises(PlanError, match=r"b.weight overlaps a.weight in memory"):
            discover(net)

    def test_slices_that_do_not_overlap_are_fine(self):
        flat = torch.empty(128)
        net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        for i, layer in enumerate(net):
            layer.weight = nn.Parameter(flat[64 * i : 64 * (i + 1)].view(8, 8))
        assert len(discover(net).params) == 2


class TestDifferentTrees:
    def test_a_parameter_of_only_one_model_is_named(self):
        plain, more = on_meta(Layer, 16, 2), on_meta(Layer, 64, 2)
        more.extra = on_meta(nn.Linear, 64, 64)
        with pytest.raises(PlanError, match=r"extra.weight is in the model but not in the base"):
            discover(more, plain)
        with pytest.raises(PlanError, match=r"extra.\w+ is in the base but not in the model"):
            discover(plain, more)

    def test_another_kind_of_module_is_named(self):
        with pytest.raises(PlanError, match=r"0.weight is a matrix \(64, 8, 3\) in the model and a matrix \(16, 8\)"):
            discover(nn.Sequential(nn.Conv1d(8, 64, 3)), nn.Sequential(nn.Linear(8, 16)))
        with pytest.raises(PlanError, match=r"0.weight is a table .* in the model and a matrix"):
            discover(nn.Sequential(nn.Embedding(8, 64)), nn.Sequential(nn.Linear(8, 16, bias=False)))


class TestRefused:
    def test_experts_and_state_spaces_by_name(self):
        class SparseMoE(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.w1 = nn.Linear(width, width)

        class MambaMixer(SparseMoE):
            pass

        class Gated(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.num_experts, self.gate = 4, nn.Linear(width, 4)

        def within(cls):
            return lambda width: nn.ModuleDict({"ffn": cls(width)})

        with pytest.raises(PlanError, match=r"ffn \(SparseMoE\) is a mixture-of-experts layer: no published rule"):
            found(within(SparseMoE), 64, 16)
        with pytest.raises(PlanError, match=r"ffn.gate \(Linear\) is a mixture-of-experts layer"):
            found(within(Gated), 64, 16)
        with pytest.raises(PlanError, match=r"ffn \(MambaMixer\) is a state-space"):
            found(within(MambaMixer), 64, 16)
        assert (
            roles_of(within(SparseMoE), 64, 16, {"*.weight": "hidden", "*.bias": "bias"})["ffn.w1.weight"] == "hidden"
        )

    def test_a_narrow_output_in_a_block_that_may_not_be_residual(self):
        class Head(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.a, self.b = nn.Linear(width, width), nn.Linear(width, 3)

        def heads(width):
            return nn.ModuleList([Head(width), Head(width)])

        with pytest.raises(PlanError, match=r"0.b.weight, .*not known to be residual"):
            found(heads, 64, 16)
        assert roles_of(heads, 64, 16, {"*.b.weight": "readout"})["1.b.weight"] == "readout"


class TestWithoutABase:
    def test_roles_are_those_of_the_comparison(self):
        model = on_meta(GPT, 64)
        alone, compared = discover(model), discover(model, on_meta(GPT, 16))
        assert alone.params == compared.params == alone.base
        assert (alone.compared, alone.base_num_layers, alone.head_dims) == (False, 2, {})

    def test_another_vocabulary_alone_is_no_comparison(self):
        _, d = found(GPT, 64, {"width": 64, "vocab": 31})
        assert not d.compared
        assert d.params == found(GPT, 64, 16)[1].params

    def test_a_raw_matrix_of_unknown_sides_is_undecided(self):
        with pytest.raises(PlanError, match=r"mixing, .* a raw parameter whose shape tells no role"):
            discover(Raw("mixing", (3, 5), 64))

    def test_a_plain_network_is_read_by_what_is_passed_on(self):
        def mlp(features, out):
            return nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, out))

        for features, out in ((784, 10), (3, 3)):
            roles = [s.role for s in discover(mlp(features, out)).params]
            assert roles == [Role.INPUT, Role.BIAS, Role.HIDDEN, Role.BIAS, Role.READOUT, Role.BIAS]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_our_own_decoder_is_read_as_its_specs_say(family):
    """models/specs.py writes by hand what discovery must find."""

    def specs_and_model(heads):
        model = {"family": family, "hidden_size": 12 * heads, "num_layers": 2, "head_dim": 12, "vocab_size": 31}
        config = parse_config({"model": {**model, "max_seq_len": 16}, "parametrization": {"scheme": "umup"}})
        shape = shape_of(config.model)
        return decoder_specs(shape), decoder(shape, plan_for(config))

    (written, model), (_, base) = specs_and_model(4), specs_and_model(2)
    for d in (discover(model, base), discover(model)):
        assert sorted(d.params, key=lambda s: s.name) == sorted(written, key=lambda s: s.name)


def test_large_models_are_read_at_once():
    """Nothing is quadratic in depth: a 400-layer model takes well under a second."""
    model, base = on_meta(GPT, 4096, layers=400), on_meta(GPT, 256)
    start = perf_counter()
    assert len(discover(model, base).params) == 400 * 11 + 5
    assert perf_counter() - start < 5


class TestUnreadable:
    def test_lazy_modules(self):
        with pytest.raises(PlanError, match=r"^0\.weight is lazy and has no shape yet; run one batch first"):
            discover(nn.Sequential(nn.LazyLinear(8)))

    def test_complex_parameters(self):
        with pytest.raises(PlanError, match=r"^weight is complex"):
            discover(nn.Linear(8, 8, dtype=torch.complex64))

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_weight_norm_of_both_kinds(self):
        old = nn.utils.weight_norm(nn.Linear(8, 8))
        with pytest.raises(PlanError, match=r"weight_g is a part of weight_norm.*remove_weight_norm"):
            discover(nn.Sequential(old))
        new = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        with pytest.raises(
            PlanError, match=r"parametrizations\.weight .*is a parametrization .*remove_parametrizations"
        ):
            discover(nn.Sequential(new))

    def test_wrapped_models(self):
        with pytest.raises(PlanError, match=r"^1 is wrapped in DataParallel: plan and apply before wrapping"):
            discover(nn.Sequential(nn.Linear(8, 8), nn.DataParallel(nn.Linear(8, 8))))
