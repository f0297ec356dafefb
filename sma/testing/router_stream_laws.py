"""The laws of a router that streams: no decision depends on later tokens, and a state replaces earlier tokens."""

import torch

from sma.pytree import named_tensors
from sma.testing.examples import Example
from sma.testing.requirements import copied, if_streams, require_near, require_unchanged, saved_and_loaded
from sma.testing.router_case import RouterCase, decide, require_same, rows_of, stream


@if_streams
def never_looks_ahead(case: RouterCase, example: Example) -> None:
    """A causal router's earlier decisions stay the same when later tokens change, even by 1e4 or to NaN, or end."""
    router, control, valid = case.make(), case.control(example), example.active()
    cut = example.length // 2
    wanted, earlier = decide(router, control, valid), valid & (torch.arange(example.length) < cut)
    for stranger in (1.0, 1e4, torch.nan):
        changed = control.clone()
        changed[:, cut:] = torch.randn_like(changed[:, cut:]) * stranger
        require_same(
            decide(router, changed, valid), wanted, earlier, f"decisions before random numbers times {stranger}"
        )
    require_same(decide(router, control, earlier), wanted, earlier, "decisions before the end of a row")


@if_streams
def chunks_equal_the_whole(case: RouterCase, example: Example) -> None:
    """Whole rows, chunks of any size with padding anywhere, and single steps give the same decisions."""
    control, valid = case.control(example), example.active()
    # A router that draws in training, or takes another path without gradients, must agree there too.
    for router in (case.make(), case.make().train()):
        with torch.set_grad_enabled(router.training):
            wanted = decide(router, control, valid)
            for name, chunks in {"chunks": example.chunks(), "single steps": example.steps()}.items():
                require_same(stream(router, control, valid, chunks)[0], wanted, valid, f"{name} against the whole")


@if_streams
def gradients_cross_chunks(case: RouterCase, example: Example) -> None:
    """A state carries gradients: training on chunks without detaching is training on the whole."""
    control, valid = case.control(example), example.active()
    whole, parts = case.make(), case.make()
    if not list(whole.parameters()):
        return
    weight = torch.randn(*valid.shape, case.modules, dtype=torch.float64) * valid[..., None]
    one, other = control.clone().requires_grad_(), control.clone().requires_grad_()
    (decide(whole, one, valid).confidence * weight).sum().backward()
    (stream(parts, other, valid, example.chunks())[0].confidence * weight).sum().backward()
    found, wanted = (
        {"control state": leaf, **dict(router.named_parameters())} for leaf, router in ((other, parts), (one, whole))
    )
    for name, a in found.items():
        b = wanted[name]
        if a.grad is None or b.grad is None:
            raise AssertionError(f"the gradient of {name!r} is None")
        require_near(a.grad, b.grad, f"the gradient of {name!r} through a state", 1e-8)


@if_streams
def states_are_values(case: RouterCase, example: Example) -> None:
    """Forward does not change the given state; a row without a valid token keeps its state bit by bit."""
    router, control, valid = case.make(), case.control(example), example.active()
    _, state = stream(router, control, valid, example.chunks())
    kept = copied(named_tensors(state))
    idle, more = torch.arange(control.shape[0]) % 2 == 0, torch.randn_like(control)
    _, after = stream(router, more, valid & ~idle[:, None], example.chunks(), state, valid.sum(1, keepdim=True))
    require_unchanged(named_tensors(state), kept, "forward changed the state it was given:")
    found, kept = ({name: x[idle] for name, x in all_rows.items()} for all_rows in (named_tensors(after), kept))
    require_unchanged(found, kept, "the state of a row without a valid token changed:")


@if_streams
def states_can_be_moved(case: RouterCase, example: Example) -> None:
    """A state can be permuted, reset, saved and loaded, and every row then continues from its own state."""
    router, control, valid = case.make(), case.control(example), example.active()
    chunks, rows, seen = list(example.chunks()), control.shape[0], valid.sum(1, keepdim=True)
    _, state = stream(router, control, valid, chunks)
    wanted, _ = stream(router, control, valid, chunks, state, seen)
    order = torch.randperm(rows)
    found, _ = stream(router, control[order], valid[order], chunks, state.reorder(order), seen[order])
    require_same(found, rows_of(wanted, order), valid[order], "rows that were permuted with their state")
    loaded = saved_and_loaded(state, router.init_state(1, dtype=control.dtype))
    found, _ = stream(router, control, valid, chunks, loaded, seen)
    require_same(found, wanted, valid, "a stream that was saved and loaded")
    reset = torch.arange(rows) % 2 == 0
    found, _ = stream(router, control, valid, chunks, state.reset(reset), seen.masked_fill(reset[:, None], 0))
    fresh, _ = stream(router, control, valid, chunks)
    require_same(found, fresh, valid & reset[:, None], "rows that were reset")
    require_same(found, wanted, valid & ~reset[:, None], "rows beside those that were reset")
