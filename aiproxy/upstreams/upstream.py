"""One upstream: its settings, its model map, and what is known of its health."""

import hashlib

import msgspec

from ..api.headers import Pairs
from ..config import UpstreamSettings
from .breaker import Breaker
from .models import ModelStates
from .rate_limits import RateLimits
from .refusals import Refusals
from .shared_state import Shared
from .tokens import TokenCommand

#: The settings that make an upstream another one; a new key may end what kept the old one failing.
_ACCOUNT = ("name", "base_url", "token", "token_command", "auth", "headers", "proxy", "ca_bundle")


class Upstream:
    """Settings are read-only; the breaker guards its own state."""

    def __init__(self, settings: UpstreamSettings, breaker: Breaker) -> None:
        self.settings = settings
        self.breaker = breaker
        self.models = ModelStates(breaker.cooldown, breaker.clock)
        self.refusals = Refusals(breaker.clock)
        self.rate_limits = RateLimits(breaker.clock)
        self.name = settings.name
        self.weight = settings.weight
        #: The processes that have the same upstream.
        self.shared = Shared()
        #: Taken out by hand: no new requests, not even as the last resort.
        self.draining = False
        self.extra_headers: Pairs = [(name.lower(), value) for name, value in settings.headers.items()]
        #: Fetches the token where a command prints it.
        self.token_command: TokenCommand | None = None

    @property
    def token(self) -> str | None:
        """The present one, None while a command is fetching the first."""
        return self.settings.token if self.token_command is None else self.token_command.current

    def credential(self, token: str) -> tuple[str, str]:
        """The header that carries a token."""
        return (
            ("authorization", f"Bearer {token}") if self.settings.auth == "bearer" else ("x-api-key", token)
        )

    @property
    def state(self) -> str:
        """Its circuit's, or `draining`."""
        return "draining" if self.draining else self.breaker.circuit().state

    @property
    def id(self) -> str:
        """The same in each process that knows it as the same account; holds no secret."""
        account = [getattr(self.settings, name) for name in _ACCOUNT]
        return f"{self.name}:{hashlib.sha256(msgspec.json.encode(account, enc_hook=str)).hexdigest()[:16]}"

    def is_same_account(self, settings: UpstreamSettings) -> bool:
        """Whether what is known of this upstream's health is true of one with these settings too."""
        return all(getattr(self.settings, name) == getattr(settings, name) for name in _ACCOUNT)

    def keep_health_of(self, old: "Upstream") -> None:
        """Take over what is known of the same account's models and refusals; the breaker is shared anyway."""
        self.models, self.refusals, self.rate_limits = old.models, old.refusals, old.rate_limits
        self.models.cooldown = self.breaker.cooldown

    def usable(self, model: str) -> bool:
        """Whether a request for the client's `model` may go here now, other than as the last resort."""
        return self.breaker.usable() and self.refusals.usable() and self.models.usable(self.model_for(model))

    def due(self, model: str) -> float:
        """The clock's time from which it may be asked for the client's `model`."""
        return max(self.breaker.due(), self.refusals.due, self.models.due(self.model_for(model)))

    def reset(self) -> None:
        """A person says that it is well: close the circuit and end all backoffs."""
        self.breaker.close()
        self.models.clear()
        self.refusals.other_result(is_success=True)

    def serves(self, model: str) -> bool:
        """Whether the client's `model` may go here; no list means every model."""
        available = self.settings.available_models
        return not available or model in available

    def model_for(self, model: str) -> str:
        """What this upstream calls the client's `model`."""
        return self.settings.model_mappings.get(model, model)

    def url(self, path: str, query: str) -> str:
        """The address of an API path; `query` is the client's, without its question mark."""
        return f"{self.settings.base_url}{path}?{query}" if query else f"{self.settings.base_url}{path}"
