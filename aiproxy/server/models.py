"""The model list: what `GET /v1/models` answers out of the configuration, and what of an upstream's list."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Self

import msgspec

from ..config import ClientKey, UpstreamSettings
from ..errors import ApiError
from ..proxy.exchange import Reply

#: The API's page size when none is asked for, and the largest.
_PAGE, _LARGEST_PAGE = 20, 1000
#: What the API itself says where a release date is unknown.
_UNKNOWN_DATE = "1970-01-01T00:00:00Z"


class Models:
    """The models that clients may name, in the order of the configuration."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(dict.fromkeys(names))

    @classmethod
    def of(cls, upstreams: Iterable[UpstreamSettings]) -> Self:
        """Those that the enabled upstreams name."""
        return cls(
            name for each in upstreams for name in sorted(each.available_models) or each.model_mappings
        )

    def for_key(self, key: ClientKey | None) -> "Models":
        """Those that a key may use; where no upstream names any, those that the key's own settings name."""
        if key is None or not key.limits.models:
            return self
        named = [name for name in key.limits.models if not name.endswith("*")]
        return Models(filter(key.limits.allow, self.names) if self.are_listed else named)

    @property
    def are_listed(self) -> bool:
        """Whether the configuration names any model."""
        return bool(self.names)

    def one(self, name: str) -> bytes:
        """One model. Raises `ApiError` 404."""
        if name not in self.names:
            raise ApiError(404, "not_found_error", f"model: {name[:100]}")
        return json.dumps(_described(name)).encode()

    def page(self, query: Mapping[str, str]) -> bytes:
        """One page of models, as `limit`, `after_id` and `before_id` ask for it.

        Raises `ApiError` 400. https://docs.anthropic.com/en/api/models-list
        """
        limit = query.get("limit", str(_PAGE))
        if not (limit.isascii() and limit.isdigit() and len(limit) < 9 and 1 <= int(limit) <= _LARGEST_PAGE):
            raise ApiError(400, "invalid_request_error", f"limit: expected 1 to {_LARGEST_PAGE}.")
        if "after_id" in query and "before_id" in query:
            raise ApiError(400, "invalid_request_error", "after_id and before_id cannot both be given.")
        start, end = 0, len(self.names)
        if "after_id" in query:
            start = self._place("after_id", query["after_id"]) + 1
        if "before_id" in query:
            end = self._place("before_id", query["before_id"])
            start = max(0, end - int(limit))
            has_more = start > 0
        else:
            has_more = end - start > int(limit)
        names = self.names[start:end][: int(limit)]
        page = {
            "data": [_described(name) for name in names],
            "has_more": has_more,
            "first_id": names[0] if names else None,
            "last_id": names[-1] if names else None,
        }
        return json.dumps(page).encode()

    def _place(self, parameter: str, name: str) -> int:
        if name not in self.names:
            raise ApiError(400, "invalid_request_error", f"{parameter}: no such model.")
        return self.names.index(name)


def allowed_only(reply: Reply, key: ClientKey | None) -> Reply:
    """An upstream's page without the models that the key may not use. Raises `ApiError` 502.

    The ids by which the next page is asked for stay the upstream's.
    """
    if key is None or not key.limits.models or reply.status != 200:
        return reply
    try:
        page = msgspec.json.decode(b"".join(reply.body), type=dict[str, Any])
        listed = msgspec.convert(page.get("data"), list[dict[str, Any]])
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError):
        raise ApiError(502, "api_error", "The upstream's list of models cannot be read.") from None
    page["data"] = [each for each in listed if key.limits.allow(str(each.get("id")))]
    body = msgspec.json.encode(page)
    return msgspec.structs.replace(reply, body=iter([body]), length=len(body))


def _described(name: str) -> dict[str, str]:
    return {"type": "model", "id": name, "display_name": name, "created_at": _UNKNOWN_DATE}
