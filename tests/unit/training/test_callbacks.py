"""Callbacks forward every hook of the training loop."""

from __future__ import annotations

from unittest.mock import create_autospec

from pipeline.training.callbacks import Callback, Callbacks

HOOKS = [name for name in vars(Callback) if not name.startswith("_")]


def test_every_hook_is_forwarded_in_order_and_closed_in_reverse() -> None:
    calls: list[tuple[str, int]] = []
    members = []
    for number in range(2):
        member = create_autospec(Callback, instance=True)
        for hook in HOOKS:
            getattr(member, hook).side_effect = lambda *_, hook=hook, number=number: calls.append((hook, number))
        members.append(member)
    callbacks = Callbacks(members)
    for hook in HOOKS:
        calls.clear()
        arguments = [None] * (getattr(Callback, hook).__code__.co_argcount - 1)
        getattr(callbacks, hook)(*arguments)
        assert calls == [(hook, number) for number in ((1, 0) if hook == "close" else (0, 1))]
