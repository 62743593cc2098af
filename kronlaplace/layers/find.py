"""The search for layers: which parts of a network get a block, which do not, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kronlaplace._arguments import Choice
from kronlaplace._wrappers import unwrapped
from kronlaplace.layers.base import Layer
from kronlaplace.layers.families import LAYERS, Family, family_of, linear_family, written_out
from kronlaplace.layers.names import NOT_WANTED_BY_EXCLUDE, NOT_WANTED_BY_LAYERS, entries_of, matching
from kronlaplace.layers.per_example import ModuleLayer, NetworkLayer, is_closed
from kronlaplace.layers.recognition import agrees_with, product_form

__all__ = ["LayerSearch", "LeftOut", "Unsupported", "find_layers", "search_layers"]


class Unsupported(Choice):
    """What happens to trainable parameters whose use no rule describes.

    ``DIAGONAL`` gives them a diagonal block from the gradients of each example, whatever the network does with them;
    ``ERROR`` raises an error that names them and the possible remedies; ``FIXED`` keeps them at their trained values.
    `KroneckerFisher.coverage` lists them.
    """

    DIAGONAL = "diagonal"
    ERROR = "error"
    FIXED = "fixed"


@dataclass(frozen=True)
class LeftOut:
    """Parameters without a block.

    Attributes:
        name: The module's name.
        module: The name of the module's type.
        parameters: Number of parameters.
        reason: Why the parameters have no block.
    """

    name: str
    module: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class LayerSearch:
    """Result of `search_layers`: the layers that get a block, and all parameters that have none."""

    layers: list[Layer]
    left_out: list[LeftOut]

    def without(self, reasons: Mapping[str, str]) -> LayerSearch:
        """Return a copy without some of the layers, given the reasons by layer name."""
        rest = [layer for layer in self.layers if layer.name not in reasons]
        new = [
            LeftOut(layer.name, type(layer.module).__name__, layer.n_parameters, reasons[layer.name])
            for layer in self.layers
            if layer.name in reasons
        ]
        return LayerSearch(rest, [*self.left_out, *new])


def find_layers(
    model: nn.Module,
    names: Sequence[str] | str | None = None,
    unsupported: Unsupported = Unsupported.DIAGONAL,
    exclude: Sequence[str] | str = (),
) -> list[Layer]:
    """Return the layers that `search_layers` finds."""
    return search_layers(model, names, unsupported, exclude).layers


def search_layers(
    model: nn.Module,
    names: Sequence[str] | str | None = None,
    unsupported: Unsupported = Unsupported.DIAGONAL,
    exclude: Sequence[str] | str = (),
) -> LayerSearch:
    """Find the layers of ``model`` that get a block, in the order of `nn.Module.named_modules`, and all that is left out.

    Args:
        model: The network; only its trainable parameters (``requires_grad``) get a block.
        names: Names or patterns of the only modules, or single blocks of modules, that get a block (see
            `kronlaplace.layers.names`); None means every module with trainable parameters.
        unsupported: What happens to trainable parameters whose use no rule describes.
        exclude: Names or patterns of modules or blocks that get no block. Modules that share a parameter with one of them
            get none either.

    Raises:
        TypeError: If a name is not a string.
        ValueError: If a name is unknown, duplicated, or without trainable parameters, if a pattern matches nothing, or if no
            layer is left.
        NotImplementedError: If a module with trainable parameters cannot get a block, naming every such module. With
            ``Unsupported.DIAGONAL``, these are modules whose outputs have no derivative.
    """
    model = unwrapped(model)
    owners = {name: m for name, m in model.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))}
    if names is None and not owners:
        raise ValueError(
            "the model has no trainable parameters (requires_grad is False everywhere), so there is nothing to "
            "estimate. Call requires_grad_(True) on the layers that should get a block."
        )
    found, refusals = _layers_of(owners, unsupported is Unsupported.DIAGONAL)
    known = list(dict.fromkeys([*owners, *(layer.name for layer in found)]))
    if names is not None:
        entries = entries_of(names, "layers")
        if not entries:
            raise ValueError(f"layers is empty; name at least one of {list(owners)}, or omit layers for all of them.")
        wanted = matching(entries, "layers", known, model)
        found = [layer for layer in found if _is_named(layer, wanted, owners)]
        refusals = {name: reason for name, reason in refusals.items() if name in wanted}
    unwanted = matching(entries_of(exclude, "exclude"), "exclude", known, model)
    excluded = [layer for layer in found if _is_named(layer, unwanted, owners)]
    found = [layer for layer in found if layer not in excluded]
    refusals = {name: reason for name, reason in refusals.items() if name not in unwanted}
    if not found and not refusals:
        raise ValueError(
            f"exclude={exclude!r} leaves no layer; the modules with trainable parameters are {list(owners)}."
        )
    if not found or (refusals and unsupported is not Unsupported.FIXED):
        raise NotImplementedError(_refusal_message(owners, refusals))
    by_layers = owners.values() if names is not None else ()
    by_exclude = [*(owners[name] for name in unwanted if name in owners), *(m for la in excluded for m in la.modules)]
    reasons = _by(NOT_WANTED_BY_LAYERS, by_layers) | _by(NOT_WANTED_BY_EXCLUDE, by_exclude)
    return LayerSearch(found, _left_out(model, found, refusals, reasons))


def _by(reason: str, modules: Iterable[nn.Module]) -> dict[int, str]:
    """Map the ids of all parameters of some modules to a reason."""
    return {id(p): reason for module in modules for p in module.parameters(recurse=False)}


def _is_named(layer: Layer, names: Collection[str], owners: Mapping[str, nn.Module]) -> bool:
    """Return whether a block or one of its modules is among the names."""
    return layer.name in names or any(owners[name] in layer.modules for name in names if name in owners)


def _layers_of(owners: dict[str, nn.Module], diagonal: bool) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers of all modules that can have one, and for each other module the reason, by module name.

    Args:
        owners: The modules with trainable parameters of their own, by name.
        diagonal: Whether modules without a rule have a layer, too.
    """
    refusals: dict[str, str] = {}
    without_rule: dict[str, str] = {}
    for name, module in owners.items():
        forbidden = _forbidden(module)
        if forbidden is not None:
            refusals[name] = forbidden
        elif (reason := _refusal(module)) is not None:
            without_rule[name] = reason
    layers: list[Layer] = []
    for members in _tied({name: module for name, module in owners.items() if name not in refusals}):
        reason = next((without_rule[name] for name, _ in members if name in without_rule), None)
        if reason is None and len(members) > 1:
            reason = _refusal_of_tie(members)
        if reason is None:
            # An embedding that is also an output layer is a table first: no Kronecker factors.
            first = next((m for m in members if _family(m[1]).kind == "embedding"), members[0])
            layers += _made(*first, tied_modules=[module for _, module in members if module is not first[1]])
        elif diagonal:
            layers.append(_per_example(members, reason))
        elif len(members) == 1 or not any(name in without_rule for name, _ in members):
            refusals.update({name: reason for name, _ in members})
        else:  # those of the tied modules that have a rule have one without the others
            refusals.update({name: without_rule[name] for name, _ in members if name in without_rule})
            rest = {name: module for name, module in members if name not in without_rule}
            again, refused = _layers_of(rest, diagonal)
            layers += again
            refusals |= refused
    order = {id(module): i for i, module in enumerate(owners.values())}
    layers.sort(key=lambda layer: min(order[id(m)] for m in layer.modules))
    return layers, refusals


def _per_example(members: Sequence[tuple[str, nn.Module]], reason: str) -> Layer:
    """Return the layer of modules whose use of their parameters no rule describes; all of them share some."""
    parameters = {
        f"{name}.{key}" if name else key: p
        for name, module in members
        for key, p in module.named_parameters(recurse=False)
        if p.requires_grad
    }
    distinct = {id(p): key for key, p in reversed(parameters.items())}
    parameters = {key: p for key, p in parameters.items() if distinct[id(p)] == key}
    (name, module), *others = members
    if not others and is_closed(module) and written_out(module) is None:
        return ModuleLayer(name, module, parameters, reason=reason)
    return NetworkLayer(name, module, parameters, [other for _, other in others], reason=reason)


def _made(name: str, module: nn.Module, tied_modules: Sequence[nn.Module] = ()) -> list[Layer]:
    layers = _family(module).make(name, module, tied_modules)
    for block_index, layer in enumerate(layers):
        layer.block_index = block_index
    return layers


def _family_of(module: nn.Module) -> tuple[type[nn.Module], Family] | None:
    """Return the type of which a module is, and its family, or None if there is none."""
    found = family_of(module)
    if found is not None:
        return found
    form = product_form(module)
    return None if form is None else (type(module), linear_family(*form))


def _family(module: nn.Module) -> Family:
    """Return the family of a module that has one."""
    found = _family_of(module)
    assert found is not None
    return found[1]


def _forward_replaced(module: nn.Module) -> bool:
    """Return whether the module has a forward pass other than its type's, not counting one that observers put there."""
    forward = vars(module).get("forward")
    if forward is None or getattr(type(forward), "only_on_original", False):
        return False
    return getattr(forward, "__func__", None) is not type(module).forward


def _forbidden(module: nn.Module) -> str | None:
    """Return why the outputs of a module have no derivative with respect to its parameters, or None."""
    found = family_of(module)
    return None if found is None else found[1].forbidden(module)


def _refusal(module: nn.Module) -> str | None:
    """Return why no rule describes what the module does with its parameters, or None."""
    found = _family_of(module)
    own = dict(module.named_parameters(recurse=False))
    trainable = {key for key, p in own.items() if p.requires_grad}
    if found is None:
        return f"this layer type is not supported; its trainable parameters are {', '.join(sorted(trainable))}"
    kind, family = found
    own_forward = type(module).forward is not kind.forward or _forward_replaced(module)
    if own_forward and not agrees_with(module, kind):
        return f"it overrides {kind.__name__}.forward, so the form of its gradient is unknown"
    if family.weight is None:
        if trainable != set(own) or any(not isinstance(p, nn.Parameter) for p in own.values()):
            return f"either all or none of its parameters must be trainable; only {sorted(trainable)} are"
    elif family.weight not in trainable or not trainable <= {family.weight, family.bias}:
        names = ["the weight", "the bias"] if family.weight == "weight" else [repr(family.weight), repr(family.bias)]
        return (
            f"its trainable parameters must be {names[0]}, with or without {names[1]}; they are {sorted(trainable)} "
            "(if this comes from weight_norm or the like, bake it in: torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return family.refusal(module)


def _tied(modules: dict[str, nn.Module]) -> list[list[tuple[str, nn.Module]]]:
    """Group modules that share parameters."""
    groups: list[list[tuple[str, nn.Module]]] = []
    for name, module in modules.items():
        mine = {id(p) for p in module.parameters(recurse=False)}
        related = [g for g in groups if any(mine & {id(p) for p in m.parameters(recurse=False)} for _, m in g)]
        merged = [member for g in related for member in g] + [(name, module)]
        groups = [g for g in groups if g not in related] + [merged]
    return groups


def _refusal_of_tie(members: list[tuple[str, nn.Module]]) -> str | None:
    names = [name for name, _ in members]
    sets = [{id(p) for p in module.parameters(recurse=False)} for _, module in members]
    if any(s != sets[0] for s in sets):
        return f"{names} share some of their parameters but not all; only modules that share all of them are supported"
    kinds = {found[0] for _, module in members if (found := _family_of(module)) is not None}
    families = [_family(module) for _, module in members]
    if len(kinds) > 1 and not all(family.is_matrix for family in families):
        return f"{names} share parameters but are of different types"
    over_space = families[0].kind in ("convolution", "transposed convolution")
    if over_space and len({_geometry(module) for _, module in members}) > 1:
        return f"{names} share a weight but differ in stride, padding or dilation"
    if any(family.forward is not None for family in families):
        return f"{names} share parameters, which is not supported for this layer type"
    return None


def _geometry(module: Any) -> tuple[Any, ...]:
    return module.stride, module.padding, module.output_padding, module.dilation, module.groups, module.padding_mode


REMEDY = (
    "To go on, leave the module out with layers=[...] (names of the modules that get a block) or exclude=[...], freeze it "
    'with requires_grad_(False) on those parameters, or pass unsupported="fixed". Its parameters then stay at their trained '
    "values."
)
"""What a caller of `estimate_fisher` can do about a module without a block."""


def _refusal_message(owners: dict[str, nn.Module], refusals: dict[str, str]) -> str:
    lines = [
        f"  {name or '(the model itself)'} ({type(owners[name]).__name__}): {why}" for name, why in refusals.items()
    ]
    return (
        "no block for\n"
        + "\n".join(lines)
        + f"\nSupported types: {', '.join(kind.__name__ for kind in LAYERS)}. {REMEDY} If your own type behaves "
        "like a supported one, register it: kl.register_layer(type, family)."
    )


def _left_out(
    model: nn.Module, layers: list[Layer], refusals: dict[str, str], reasons: Mapping[int, str]
) -> list[LeftOut]:
    """List all parameters without a block by module; ``reasons`` covers those that the caller left out, by id."""
    covered = {id(p) for layer in layers for p in (*layer.parameters.values(), *layer.merged_parameters.values())}
    rows = []
    for name, module in model.named_modules():
        rest = [p for p in module.parameters(recurse=False) if id(p) not in covered]
        counts: dict[str, int] = {}
        for p in rest:
            if p.requires_grad:
                why = refusals.get(name) or reasons.get(id(p), "no block")
            else:
                why = "frozen: requires_grad is False"
            counts[why] = counts.get(why, 0) + p.numel()
        rows += [LeftOut(name, type(module).__name__, count, why) for why, count in counts.items() if count]
    return rows
