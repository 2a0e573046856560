"""Selection of the trained parameters."""

from collections.abc import Sequence
from fnmatch import fnmatch

from reca.models.base import ROLES, Adapter
from reca.options.names import hint


def freeze(adapter: Adapter, roles: list[str] | None, frozen: Sequence[str] = ()) -> list[str]:
    """Freeze all parameters but those of `roles` (None: the adapter's default), and return the trained roles.

    frozen: name patterns of further parameters to freeze.
    Raises ValueError for an unknown role, a role without parameters in this model, a parameter without a role, a
    pattern that matches nothing, and if nothing is left to train.
    """
    role_of = adapter.roles()
    wanted = sorted(roles if roles is not None else adapter.trainable_roles)
    present = set(role_of.values())
    for role in wanted:
        if role not in ROLES:
            raise ValueError(
                f"train.roles names {role!r}, which is not a role; roles are {', '.join(ROLES)}{hint(role, ROLES)}"
            )
        if roles is not None and role not in present:
            raise ValueError(f"{adapter.name} has no parameters of role {role!r}; it has {', '.join(sorted(present))}")
    for name, _ in adapter.named_parameters():
        if role_of.get(name, "") not in ROLES:
            found = role_of.get(name)
            raise ValueError(f"{adapter.name}: roles() gives {name} {found!r}; expected one of {', '.join(ROLES)}")
    for pattern in frozen:
        if not any(fnmatch(name, pattern) for name in role_of):
            raise ValueError(f"train.frozen: no parameter matches {pattern!r}; names look like {min(role_of)!r}")
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(role_of[name] in wanted and not any(fnmatch(name, pattern) for pattern in frozen))
    if not any(parameter.requires_grad for parameter in adapter.parameters()):
        raise ValueError(
            f"nothing is trained: no parameter has a role to train ({', '.join(wanted) or 'none is named'}), or "
            "train.frozen matches all that have; train.roles sets these roles"
        )
    return [role for role in wanted if role in present]
