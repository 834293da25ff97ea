"""What the compiled model keeps for the backward pass: FP8 recipes keep FP8 operands, and nothing beside them."""

import pytest
import torch

from umup.config.load import parse_config
from umup.models.build import build

TOKENS, WIDTH, LAYERS = 512, 128, 4


def saved_bytes(scheme, recipe, **precision):
    """Bytes per token and layer, in units of the width, of all that is kept but weights and scales."""
    config = parse_config(
        {
            "model": {"hidden_size": WIDTH, "num_layers": LAYERS, "head_dim": 32, "intermediate_size": 352}
            | {"max_seq_len": 128, "norm_gain": False},
            "parametrization": {"scheme": scheme},
            "optimizer": {"master_dtype": "bf16"},
            "precision": {"recipe": recipe, "backend": "emulate", **precision},
        }
    )
    torch._dynamo.reset()
    model = build(config)
    held = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(256, (4, 129))
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return sum(kept.values()) / (TOKENS * WIDTH * LAYERS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fp8_keeps_fp8():
    bf16, fp8, compact = (
        saved_bytes(*which, **precision)
        for which, precision in [
            (("sp", "bf16"), {}),
            (("umup", "fp8"), {}),
            (("umup", "fp8"), {"compact": True}),
        ]
    )
    assert fp8 < 0.70 * bf16
    # gate and up are 2 x 2.75 widths of two bytes; in E4M3 of one
    assert fp8 - compact == pytest.approx(5.5, abs=0.2)
