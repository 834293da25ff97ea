"""A network with one parameter of every role, of any width and depth."""

from collections.abc import Callable, Iterable
from functools import cache

import pytest

from umup.rules.plan import Plan, make_plan
from umup.rules.roles import Architecture, OpKind, OpSite, ParamSpec, Role, Sizes
from umup.rules.schemes import SCHEMES

FIXED, BASE_WIDTH, BASE_DEPTH = 8, 64, 2
IN_BRANCH = (Role.HIDDEN, Role.HIDDEN_OUT, Role.NORM_GAIN, Role.NORM_BIAS, Role.BIAS)


def _spec(role: Role, n: int, in_branch: bool) -> ParamSpec:
    fan_in, fan_out, shape = {
        **dict.fromkeys((Role.EMBEDDING, Role.POSITION), (FIXED, n, (FIXED, n))),
        Role.INPUT: (FIXED, n, (n, FIXED)),
        **dict.fromkeys((Role.HIDDEN, Role.HIDDEN_OUT), (n, n, (n, n))),
        **dict.fromkeys((Role.READOUT, Role.TIED_READOUT), (n, FIXED, (FIXED, n))),
        **dict.fromkeys((Role.NORM_GAIN, Role.NORM_BIAS, Role.BIAS), (n, n, (n,))),
        Role.SCALAR: (1, 1, ()),
    }[role]
    owner = Role.EMBEDDING if role is Role.TIED_READOUT else None
    return ParamSpec(f"branch.{role}" if in_branch else role, role, shape, fan_in, fan_out, in_branch, owner)


def _network(scheme: str, width: int, depth: int, roles: Iterable[Role]) -> Architecture:
    roles = list(roles)
    params = [_spec(role, width, False) for role in roles]
    params += [_spec(role, width, True) for role in roles if role in IN_BRANCH]
    branches = (OpKind.RESIDUAL_ATTN, OpKind.RESIDUAL_MLP)
    sites = [OpSite(f"layers.{i}.{kind}", kind) for i in range(depth) for kind in branches]
    sites += [OpSite(kind, kind) for kind in OpKind if kind not in branches]
    sizes = Sizes(depth, 128, 16, 8, 32, norm_placement=SCHEMES[scheme].norm_placements[0])
    return Architecture(tuple(params), tuple(sites), sizes)


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., Plan]:
    """A plan whose parameters are named after their roles, `branch.ROLE` inside a residual branch."""

    @cache
    def make(
        scheme: str,
        optimizer: str,
        width: int = BASE_WIDTH,
        depth: int = BASE_DEPTH,
        independent: bool = True,
        roles: tuple[Role, ...] = tuple(Role),
        option: tuple[str, str] | None = None,
    ) -> Plan:
        return make_plan(
            scheme,
            _network(scheme, width, depth, roles),
            _network(scheme, BASE_WIDTH, BASE_DEPTH, roles) if SCHEMES[scheme].needs_base else None,
            optimizer=optimizer,
            independent_weight_decay=independent,
            options=dict([option] if option else []),
        )

    return make
