"""`umup explain CONFIG [--against SCHEME | --memory]`."""

import json
from dataclasses import asdict

from umup.cli.arguments import config_parser, parse_with_config


def run(arguments: list[str]) -> int:
    """Print the plan, how it differs from another scheme's, or what its tensors weigh."""
    parser = config_parser("explain", "The plan of a config: every number with its rule and source.")
    parser.add_argument("--against", metavar="SCHEME", help="show only what differs under this scheme")
    parser.add_argument("--memory", action="store_true", help="show bytes per parameter, by component, instead")
    known, config = parse_with_config(parser, arguments)

    from umup.models.specs import plan_for, plan_under, products_for
    from umup.rules.explain import diff_text, explain_text

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
        print(json.dumps({**json.loads(plan.to_json()), "precision": precision}, indent=1))
        return 0
    if known.against is None:
        print(explain_text(plan, products))
        return 0
    other = plan_under(config, known.against)
    if known.json:
        print(json.dumps({"schemes": [plan.scheme, other.scheme], "differences": plan.diff(other)}))
    else:
        print(diff_text(plan, other))
    return 0
