"""What the webhook is told: budgets that are nearly used, circuits, and that no upstream is usable."""

import time
from collections.abc import Mapping, Sequence

from ..ledger.budgets import Limit
from ..ledger.ledger import Ledger
from ..ledger.rows import money
from ..ledger.store import LedgerError
from ..observability.webhook import Webhook
from ..upstreams.breaker import Circuit, CircuitState

#: Parts of a budget at which it is told.
_SHARES = (1.0, 0.95, 0.75)
#: Seconds in which several workers tell the same only once.
_AGAIN = 60.0
_NEVER = 1e10
_BROKEN = (CircuitState.OPEN, CircuitState.HALF_OPEN)


class Alerts:
    """Used by the thread that follows the configuration; each `look` compares with the one before."""

    def __init__(self, webhook: Webhook, ledger: Ledger | None) -> None:
        """`ledger`: by it several workers agree on who tells."""
        self._webhook = webhook
        self._ledger = ledger
        self._told: set[str] = set()
        self._broken: frozenset[str] | None = None
        self._was_usable = True

    def look(
        self,
        url: str,
        server: str,
        budgets: Sequence[Limit],
        circuits: Mapping[str, Circuit],
        unready: str | None,
    ) -> None:
        """Tell what is new. `unready`: why no upstream is usable, None if one is."""
        found = [*self._budgets(budgets), *self._circuits(circuits)]
        if unready is not None and self._was_usable:
            found.append(("no upstream is usable", f"{unready[:1].upper()}{unready[1:]}.", _AGAIN))
        self._was_usable = unready is None
        for what, text, again_after in found:
            if self._is_first(what, again_after):
                self._webhook.send(url, f"aiproxy on {server}: {text}")

    def _budgets(self, budgets: Sequence[Limit]) -> list[tuple[str, str, float]]:
        found = []
        for each in budgets:
            share = next((share for share in _SHARES if each.share >= share), None)
            whose = "all keys together" if each.client is None else f"the key {each.client}"
            what = f"budget {each.client!r} {each.period.name} {each.period.first} {share}"
            if share is None or what in self._told:
                continue
            self._told.add(what)
            spent = f"{money(each.spent)} of {money(each.limit)}"
            words = "is used up" if share >= 1 else f"is used to {share:.0%}"
            text = f"The {each.period.name} budget of {whose} {words}: {spent} are spent. "
            found.append((what, f"{text}It begins anew at {each.period.reset_text}.", _NEVER))
        return found

    def _circuits(self, circuits: Mapping[str, Circuit]) -> list[tuple[str, str, float]]:
        broken = frozenset(name for name, circuit in circuits.items() if circuit.state in _BROKEN)
        before, self._broken = self._broken, broken
        if before is None:  # of what was so at the start somebody knows
            return []
        found = []
        for name in sorted(broken - before):
            minutes = circuits[name].seconds / 60
            text = f"The circuit of the upstream {name} is open. It is tried again in {minutes:.0f} min."
            found.append((f"circuit {name} open", text, _AGAIN))
        for name in sorted((before - broken) & circuits.keys()):
            text = f"The circuit of the upstream {name} is closed: it is in use again."
            found.append((f"circuit {name} closed", text, _AGAIN))
        return found

    def _is_first(self, what: str, again_after: float) -> bool:
        """Whether no other worker has told it; without a ledger every worker tells."""
        if self._ledger is None:
            return True
        try:
            return self._ledger.read(lambda store: store.announce(what, time.time(), again_after))
        except LedgerError:
            return True
