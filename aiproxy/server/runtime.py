"""What serves: everything that is built of one configuration, and what outlives it.

A new configuration means new `Runtime`, put in the place of the old in one step. Requests that are under
way keep those by which they came in, and so end as they began.
"""

import contextlib
import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from .. import __version__
from ..config import Config, ConfigError, UpstreamSettings, check_addresses, secrets_in
from ..ledger.budgets import Budgets
from ..ledger.ledger import Ledger
from ..ledger.prices import Prices
from ..observability import logs
from ..observability.history import History
from ..observability.metrics import Figures, Metrics, exposition_of, merged
from ..observability.redaction import Redactor
from ..observability.webhook import Webhook
from ..proxy.attempt import Tools
from ..proxy.failover import Failover
from ..proxy.journal import Journal
from ..transport.connection import credentials
from ..transport.session import Transport
from ..transport.wait import Shutdown, Wait
from ..upstreams.balancer import Balancer
from ..upstreams.breaker import Breaker, Change, CircuitState, Event
from ..upstreams.message_threads import Owners
from ..upstreams.shared_state import State
from ..upstreams.tokens import TokenCommand
from ..upstreams.upstream import Upstream
from .alerts import Alerts
from .auth import ClientKeys
from .client import Serving
from .limits import SPARE, InFlight, KeyPlaces
from .models import Models
from .peer import Peers
from .reload import Follower, LastGood, Start, changes
from .status import Snapshot, Status, findings, put_together, rows

#: gunicorn.conf.py's; `serve` sets another value of the command line or of another server.
DEFAULT_THREADS = 256
#: Characters of a configured header's value that may be a key: a team's name is too short for one.
_SHORTEST_HEADER = 16
#: Fetched tokens that the log hides, the latest ones.
_FETCHED = 100


class Runtime(msgspec.Struct, frozen=True):
    """What a request meets: of one configuration, but for the gates and the shutdown."""

    config: Config
    balancer: Balancer
    failover: Failover
    owners: Owners
    models: Models
    keys: ClientKeys
    peers: Peers
    journal: Journal
    budgets: Budgets | None  # None without a ledger
    key_places: KeyPlaces
    in_flight: InFlight
    discards: InFlight  # how many refused bodies are read away at a time, beside the requests in flight
    shutdown: Shutdown


class Service:
    """`runtime` may be read from any thread; the rest is for the server and for whoever follows the file."""

    def __init__(self, config: Config, clock: Callable[[], float], metrics: Metrics, state: State) -> None:
        """`clock`: monotonic seconds, the circuit breakers'; `state`: what other processes know."""
        self.metrics = metrics
        self.history = History(time.time)
        self.is_stopping = False
        self.began = time.time()
        self.taken_up = self.began
        self.digest = ""
        #: Why the file as it is now is not in force; empty where it is.
        self.faults: tuple[str, ...] = ()
        self._clock = clock
        self._fetched: deque[str] = deque(maxlen=_FETCHED)  # tokens that commands have printed lately
        self._shutdown = Shutdown()
        self._transport = Transport(config.timeouts.connect)
        self._state = state
        self._owners = Owners(clock, state)
        self.ledger = Ledger(config.ledger, time.time) if config.ledger is not None else None
        self._alerts = Alerts(Webhook(), self.ledger)
        self._in_flight = InFlight(config.max_in_flight)
        self._in_flight.set_threads(DEFAULT_THREADS)
        self._discards = InFlight(SPARE // 2)
        self._key_places = KeyPlaces(state, self._in_flight)
        self._addresses: list[Any] = []
        self._server = _server_name([])
        self._follower: Follower | None = None
        self.runtime = self._built(config, {}, {})

    def follow(self, path: Path, begun: Start, last_good: LastGood | None) -> None:
        """Take up what becomes of the file, once `serve` says that this process serves."""
        self.digest = begun.sources.digest
        if begun.faults:  # another process has counted them
            self._refuse(begun.faults)
        self._follower = Follower(path, begun, self, last_good)

    def serve(self, threads: int, addresses: list[Any]) -> None:
        """`threads`: how many the server has for requests; `addresses`: those of its listening sockets."""
        self._in_flight.set_threads(threads)
        self._addresses = addresses
        self._server = _server_name(addresses)
        self._state.start(self._encoded_snapshot, _added_up, lambda: self._in_flight.count > 0)
        written = self._state.rows()
        siblings = [
            snapshot for id_, snapshot in written.running + written.ended if id_ == self._state.instance
        ]
        self.metrics.start_from(each.metrics for each in _snapshots(siblings))
        for upstream in self.runtime.balancer.upstreams:
            upstream.token  # noqa: B018 - a command begins to fetch it
        if self.ledger is not None:
            self.ledger.start(is_awaited=self.runtime.config.has_budgets)
        if self._follower is not None:
            self._follower.start()

    def serving(self, client: socket.socket) -> Serving:
        """How a request on this client's connection waits."""
        return Serving(Wait(client, self._shutdown), self.runtime.config.timeouts.idle)

    def apply(self, config: Config, digest: str) -> None:
        """Serve by another configuration from now on.

        Raises `ConfigError` where the addresses forbid it, and where it has budgets but this process was
        started without a ledger. Upstreams that stay keep the state of their circuits and their place in the
        round robin.
        """
        check_addresses(config, self._addresses)
        if config.has_budgets and self.ledger is None:
            raise ConfigError(["ledger: aiproxy was started without one, and budgets need it: restart it"])
        old = self.runtime
        self._transport.connect_timeout = config.timeouts.connect
        self._in_flight.configure(config.max_in_flight)
        staying = {upstream.name: upstream for upstream in old.balancer.upstreams}
        self.runtime = self._built(config, staying, old.balancer.cursor)
        kept = {upstream.token_command for upstream in self.runtime.balancer.upstreams}
        for upstream in old.balancer.upstreams:
            if upstream.token_command is not None and upstream.token_command not in kept:
                upstream.token_command.stop()
        self._transport.keep_only(
            (each.settings.base_url, each.settings.proxy, each.settings.ca_bundle)
            for each in self.runtime.balancer.upstreams
        )
        self.taken_up, self.digest, self.faults = time.time(), digest, ()
        said = "; ".join(changes(old.config, config)) or "none"
        self.metrics.reloaded("applied")
        logs.line(logging.INFO, "reload", result="applied", configuration=self.digest, changes=said)
        for warning in config.warnings:
            logs.line(logging.WARNING, "reload", warning=warning)

    def refuse(self, faults: Iterable[str]) -> None:
        """The file has become one that cannot be served: what is in force stays."""
        self.metrics.reloaded("refused")
        self._refuse(faults)

    def _refuse(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        for fault in self.faults:
            logs.line(logging.ERROR, "reload", result="refused", configuration=self.digest, fault=fault)

    def update_gauges(self) -> None:
        """Tell the metrics how the circuits are now: time alone changes them."""
        self.metrics.circuits({each.name: each.state for each in self.runtime.balancer.upstreams})
        for each in self.runtime.balancer.upstreams:
            self.metrics.rate_limits(each.name, each.rate_limits.shares())
        self.metrics.load(self._in_flight.count, self._in_flight.limit, logs.dropped())
        budgets = self.runtime.budgets
        if budgets is not None and self.ledger is not None:
            shares = {(each.client or "all", each.period.name): each.share for each in budgets.every()}
            self.metrics.ledger(shares, self.ledger.dropped)

    def alert(self) -> None:
        """Tell the webhook what is new, if there is one."""
        runtime = self.runtime
        if runtime.config.webhook is None:
            return
        self._alerts.look(
            runtime.config.webhook,
            self._server,
            runtime.budgets.every() if runtime.budgets is not None else [],
            {each.name: each.breaker.circuit() for each in runtime.balancer.upstreams},
            None if self.is_stopping else self.unready(),
        )

    def unready(self) -> str | None:
        """Why a new request had better go elsewhere; None where some upstream is usable."""
        if self.is_stopping:
            return "aiproxy is stopping"
        taking = [upstream for upstream in self.runtime.balancer.upstreams if not upstream.draining]
        circuits = [upstream.breaker.circuit() for upstream in taking]
        if any(circuit.state in (CircuitState.CLOSED, CircuitState.HALF_OPEN) for circuit in circuits):
            return None
        if not circuits:
            return "every upstream is being drained"
        soonest = min(circuit.seconds for circuit in circuits)
        return (
            f"no upstream is usable: all circuits are open or in backoff, the first for {soonest:.0f} s more"
        )

    def status(self) -> Status:
        """Everything that the status page shows, of all workers where they can be asked."""
        own = self._snapshot()
        written = self._state.rows()
        others = _snapshots(snapshot for _, snapshot in written.running)
        silent = _snapshots(snapshot for _, snapshot in written.silent)
        now = time.time()
        return Status(
            version=__version__,
            now=now,
            began=self.began,
            configuration=self.digest,
            taken_up=self.taken_up,
            faults=self.faults,
            worker=os.getpid(),
            in_flight=sum(snapshot.in_flight for snapshot in (own, *others)),
            upstreams=rows(self.runtime.balancer.upstreams, [own, *others], now),
            workers=put_together([own, *others]),
            is_shared=self._state.is_shared,
            silent=[f"{each.server}, worker {each.worker}" for each in silent],
            problem=written.problem,
            ledger=self.ledger.problem if self.ledger is not None else None,
        )

    def exposition(self) -> tuple[bytes, str]:
        """Body and content type of the answer to Prometheus, of all workers whose figures are known."""
        own = self._snapshot()
        written = self._state.rows()
        figures: dict[str, tuple[list[Snapshot], list[Snapshot]]] = {self._state.instance: ([own], [])}
        for place, snapshots in enumerate((written.running, written.ended)):
            for id_, snapshot in snapshots:
                figures.setdefault(id_, ([], []))[place].extend(_snapshots([snapshot]))
        return exposition_of(self._figures_of(figures))

    def _figures_of(self, instances: dict[str, tuple[list[Snapshot], list[Snapshot]]]) -> list[Figures]:
        """One for each gunicorn. The label tells machines of the same name and port apart by ids."""
        if not self._state.has_machines:
            together = [[each.metrics for both in instances.values() for each in both[n]] for n in (0, 1)]
            return [Figures(None, *together)]
        names = {id_: running[0].server for id_, (running, _) in instances.items() if running}
        count = Counter(names.values())
        labels = {id_: name if count[name] == 1 else f"{name}#{id_}" for id_, name in names.items()}
        return [
            Figures(
                labels[id_],
                [each.metrics for each in running],
                [each.metrics for each in ended],
            )
            for id_, (running, ended) in instances.items()
            if running
        ]

    def act(self, upstream: str, action: str) -> bool:
        """Do what a button of the status page says; False where there is no such upstream or action.

        `close` closes the circuit; `drain` takes the upstream out, `resume` back in, each at the latest
        until the next reload.
        """
        found = next((each for each in self.runtime.balancer.upstreams if each.name == upstream), None)
        if found is None or action not in ("close", "drain", "resume"):
            return False
        if action == "close":
            found.reset()
            logs.circuit(upstream, "closed")
            found.shared.report(Change(Event.CLOSED))
        else:
            found.draining = action == "drain"
            found.shared.drain(found.draining)
        logs.line(logging.WARNING, "status", upstream=upstream, action=action)
        self.update_gauges()
        return True

    def shut_down(self, graceful_timeout: float) -> None:
        """The server stops; the requests that are left end shortly before `graceful_timeout` is over."""
        self.is_stopping = True
        if self._follower is not None:
            self._follower.stop()
        self._shutdown.begin(graceful_timeout)

    def after_run(self) -> None:
        """Nothing is served any more: other processes are to know, and the ledger is to be complete."""
        if self.ledger is not None:
            self.ledger.stop()
        self._state.stop()

    def close(self) -> None:
        """Give back the threads, their descriptors and the kept connections."""
        if self._follower is not None:
            self._follower.stop()
        for upstream in self.runtime.balancer.upstreams:
            if upstream.token_command is not None:
                upstream.token_command.stop()
        self.after_run()
        self._transport.close()
        self._shutdown.close()

    def _snapshot(self) -> Snapshot:
        self.update_gauges()
        return Snapshot(
            server=self._server,
            worker=os.getpid(),
            version=__version__,
            configuration=self.digest,
            began=self.began,
            in_flight=self._in_flight.count,
            hours=self.history.hours(),
            metrics=self.metrics.families(),
            findings={each.name: findings(each) for each in self.runtime.balancer.upstreams},
        )

    def _encoded_snapshot(self) -> bytes:
        return msgspec.json.encode(self._snapshot())

    def _built(self, config: Config, staying: dict[str, Upstream], cursor: dict[str, float]) -> Runtime:
        logs.configure(config.logging)
        logs.adopt(logging.getLogger("gunicorn.error"))
        enabled = [settings for settings in config.upstreams if settings.enabled]
        upstreams = [self._upstream(config, staying.get(settings.name), settings) for settings in enabled]
        self._state.share(upstreams)
        balancer = Balancer(upstreams, cursor)
        prices = Prices(config.prices, enabled)
        journal = Journal(_redactor(config, self._fetched), self.metrics, self.history, prices, self.ledger)
        self.history.keep(settings.name for settings in enabled)
        models = Models.of(enabled)
        mapped = (model for settings in enabled for model in settings.model_mappings.values())
        self.metrics.know_models([*models.names, *mapped])
        tools = Tools(self._transport, config.timeouts, journal.redactor)
        return Runtime(
            config=config,
            balancer=balancer,
            failover=Failover(balancer, tools, self._owners, config.affinity, self._clock),
            owners=self._owners,
            models=models,
            keys=ClientKeys(config.api_keys),
            peers=Peers(config.trusted_proxies),
            journal=journal,
            budgets=Budgets(config, self.ledger, time.time) if self.ledger is not None else None,
            key_places=self._key_places,
            in_flight=self._in_flight,
            discards=self._discards,
            shutdown=self._shutdown,
        )

    def _upstream(self, config: Config, old: Upstream | None, settings: UpstreamSettings) -> Upstream:
        """An upstream that keeps what is known of its health where the account is the same."""
        failures, cooldown = config.breaker.failures, config.breaker.cooldown
        is_same = old is not None and old.is_same_account(settings)
        breaker = old.breaker if old is not None and is_same else Breaker(failures, cooldown, self._clock)
        upstream = Upstream(settings, breaker)
        if settings.token_command:
            upstream.token_command = self._token_command(old, settings)
        if old is not None and is_same:
            breaker.configure(failures, cooldown)
            upstream.keep_health_of(old)
        return upstream

    def _token_command(self, old: Upstream | None, settings: UpstreamSettings) -> TokenCommand:
        """The old one where it runs the same command."""
        wanted = (settings.token_command, settings.token_lifetime)
        command = old.token_command if old is not None else None
        if command is not None and (command.command, command.lifetime) == wanted:
            return command
        return TokenCommand(settings.name, *wanted, self._learn)

    def _learn(self, token: str) -> None:
        """A command has printed a token: no log may show it."""
        self._fetched.append(token)
        self.runtime.journal.redactor.learn(token)


def _redactor(config: Config, fetched: Iterable[str]) -> Redactor:
    """`fetched`: tokens that commands have printed."""
    headers = [value for upstream in config.upstreams for value in upstream.headers.values()]
    urls = [*(upstream.proxy for upstream in config.upstreams), config.webhook]
    urls += [*secrets_in(config.state), *secrets_in(config.ledger)]
    return Redactor(
        tokens=[
            *(upstream.token for upstream in config.upstreams),
            *fetched,
            *(value for value in headers if len(value) >= _SHORTEST_HEADER),
            *(part for url in urls if url for part in _secret_parts(url)),
        ],
        keys=[*secrets_in(config.api_keys), *secrets_in(config.admin_key)],
        headers=[name for upstream in config.upstreams for name in upstream.headers],
    )


def _secret_parts(url: str) -> list[str]:
    """The password of a URL, as it is written and as it is sent; a webhook's path is as good as one."""
    parts = urlsplit(url)
    if not parts.password:
        return [parts.path] if parts.scheme.startswith("http") else []
    return [parts.password, unquote(parts.password), credentials(url) or ""]


def _snapshots(written: Iterable[msgspec.Raw]) -> list[Snapshot]:
    """What other workers wrote; what another version wrote in another form is left out."""
    found = []
    for row in written:
        with contextlib.suppress(msgspec.DecodeError):
            found.append(msgspec.json.decode(row, type=Snapshot))
    return found


def _added_up(written: list[msgspec.Raw]) -> bytes:
    """One snapshot for several ended workers, with all that they counted."""
    snapshots = _snapshots(written)
    metrics = merged([], [each.metrics for each in snapshots])
    return msgspec.json.encode(msgspec.structs.replace(snapshots[0], hours={}, findings={}, metrics=metrics))


def _server_name(addresses: list[Any]) -> str:
    """What people call this gunicorn: the machine, and the port or socket."""
    places = [each[1] if isinstance(each, tuple) else each for each in addresses]
    return ":".join(map(str, [socket.gethostname(), *places]))
