"""`umup explain CONFIG [--against SCHEME]`."""

import json

from umup.cli.arguments import config_parser, parse_with_config


def run(arguments: list[str]) -> int:
    """Print the plan, or how it differs from another scheme's."""
    parser = config_parser("explain", "The plan of a config: every number with its rule and source.")
    parser.add_argument("--against", metavar="SCHEME", help="show only what differs under this scheme")
    known, config = parse_with_config(parser, arguments)

    from umup.models.specs import plan_for, plan_under
    from umup.rules.explain import diff_text, explain_text

    plan = plan_for(config)
    if known.against is None:
        print(plan.to_json() if known.json else explain_text(plan))
        return 0
    other = plan_under(config, known.against)
    if known.json:
        print(json.dumps({"schemes": [plan.scheme, other.scheme], "differences": plan.diff(other)}))
    else:
        print(diff_text(plan, other))
    return 0
