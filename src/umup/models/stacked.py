"""Several decoders of one shape as one module: every parameter has a leading model axis, and so has every activation.

The module is the ordinary Decoder, since the ops take a model axis (ops/linear.py and its neighbours): weights
(models, fan_out, fan_in), tokens (models, batch, positions). One kernel then serves all members, which keeps a GPU busy
that each small network alone leaves idle.

Not covered: FP8 products and dropout (study/stacked.py refuses them), and a loss in chunks: the logits of all members
exist at once, models * tokens * vocabulary numbers in float32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from umup.config.sections import RunConfig
from umup.models.build import build, initial_value
from umup.models.decoder import Decoder
from umup.ops.loss import cross_entropy
from umup.rules.plan import Plan


def build_stacked(config: RunConfig, plan: Plan, seeds: Sequence[int], device: torch.device | str = "cpu") -> Decoder:
    """The config's model once per seed, as one: each parameter (models, *shape), initialised as `build` would.

    Tied parameters stay tied. Raises ConfigError where `build` does.
    """
    model = build(config, plan)
    stacked = {p: nn.Parameter(p.new_empty(len(seeds), *p.shape, device=device)) for p in model.parameters()}
    for name, p in list(model.named_parameters(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, stacked[p])
    initialise_stacked(model, plan, seeds)
    return model.to(device)


@torch.no_grad()
def initialise_stacked(model: Decoder, plan: Plan, seeds: Sequence[int]) -> None:
    """Give each member its seed's initial weights, in place."""
    parameters = dict(model.named_parameters())
    for name in plan.stored:
        draws = {seed: initial_value(plan, name, seed) for seed in dict.fromkeys(seeds)}
        parameters[name].copy_(torch.stack([draws[seed] for seed in seeds]))


def stacked_loss(model: Decoder) -> Callable[[Tensor, Tensor], Tensor]:
    """tokens and targets, (models, batch, positions) each -> each member's mean cross entropy in nats, (models).

    The gradient of their sum is, for every member, that of `Decoder.loss` alone.
    """

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(tokens), targets, model.loss_multiplier, model.loss_grad, stacked=True)

    return loss
