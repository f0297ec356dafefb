"""One router for several layers: its parameters exist once."""

from collections.abc import Mapping, Sequence

from sma.routers.contract import Router, RouterSpec


def check_alike(routers: Sequence[tuple[RouterSpec, Sequence[str]]]) -> None:
    """Check that one router can serve several layers.

    Args:
        routers: the router and the names of the sub-modules of every routed layer.

    Raises:
        ValueError: they differ, or there are none.
    """
    if not routers:
        raise ValueError("shared_router=true needs layers with routed modules; add some, or set shared_router=false")
    (router, names), *others = routers
    for index, (other, own) in enumerate(others, 1):
        if other != router or list(own) != list(names):
            raise ValueError(
                "shared_router=true needs the same router and the same modules in every routed layer, but routed layer "
                f"{index} has {other.kind} for {list(own)} and routed layer 0 {router.kind} for {list(names)}; make "
                "them equal, or set shared_router=false"
            )


def place_routers(routers: Mapping[int, Router], *, share: bool) -> None:
    """Set the layer indices of a model's routers and, with `share`, let all use the parameters of the first.

    Buffers, such as score biases, stay those of each router.
    """
    for index, router in routers.items():
        router.layer_index = index
    if share:
        first, *others = routers.values()
        for name, parameter in list(first.named_parameters()):
            path, _, leaf = name.rpartition(".")
            for other in others:
                setattr(other.get_submodule(path), leaf, parameter)
