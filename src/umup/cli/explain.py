"""`umup explain CONFIG [--against SCHEME | --memory]`."""

import json
from dataclasses import asdict

from umup.cli.arguments import config_parser, parse_with_config
from umup.config.sections import RunConfig
from umup.errors import ConfigError, did_you_mean
from umup.rules.explain import diff_text, explain_text, trained_by
from umup.rules.schemes import SCHEMES


def run(arguments: list[str]) -> int:
    """Print the plan, how it differs from another scheme's, or what its tensors weigh."""
    parser = config_parser("explain", "The plan of a config: every number with its rule and source.")
    parser.add_argument("--against", metavar="SCHEME", help="show only what differs under this scheme")
    parser.add_argument("--memory", action="store_true", help="show bytes per parameter, by component, instead")
    known, config = parse_with_config(parser, arguments)

    from umup.models.specs import plan_for, plan_under, products_for

    if known.memory:
        from umup.models.memory import memory_table, memory_text

        rows = [asdict(row) for row in memory_table(config)] if known.json else None
        print(memory_text(config) if rows is None else json.dumps({"memory": rows}, indent=1))
        return 0
    plan = plan_for(config)
    products = products_for(config, plan)
    if known.against is None and known.json:
        by_name = {name: asdict(product) for name, product in products.items()}
        precision = {**config.precision.model_dump(), "products": by_name}
        added = {"trained_by": trained_by(plan), "precision": precision}
        print(json.dumps({**json.loads(plan.to_json()), **added}, indent=1))
        return 0
    if known.against is None:
        print(explain_text(plan, products))
        return 0
    _check_against(config, known.against)
    other = plan_under(config, known.against)
    if known.json:
        print(json.dumps({"schemes": [plan.scheme, other.scheme], "differences": plan.diff(other)}))
    else:
        print(diff_text(plan, other))
    return 0


def _check_against(config: RunConfig, name: str) -> None:
    """Another scheme is compared on the config's own network and, where it is relative, from the config's base."""
    if name not in SCHEMES:
        raise ConfigError(f"--against: unknown scheme {name!r}; {did_you_mean(name, SCHEMES)}")
    from umup.models.specs import shape_of

    other, given = SCHEMES[name], config.parametrization
    if shape_of(config.model).traits.norm_placement not in other.norm_placements:
        raise ConfigError(
            f"--against: scheme {name!r} is made for another network; explain it by a config of its own, with "
            f"model.norm_placement: {other.norm_placements[0]} and parametrization.scheme: {name}"
        )
    if other.needs_base and given.base is None:
        layers = f", num_layers: {config.model.num_layers}" if other.needs_base_depth else ""
        base = f"{{hidden_size: {config.model.hidden_size}{layers}}}"
        raise ConfigError(
            f"--against: scheme {name!r} needs a base shape and this config has none; turn it round: write "
            f"parametrization: {{scheme: {name}, base: {base}}} in the config, and --against {given.scheme}"
        )
