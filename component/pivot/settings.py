"""What --mode pifa is told. Light: the front door imports it."""

from dataclasses import dataclass
from typing import Any

from component.checkpoint.request import Request


@dataclass(frozen=True, kw_only=True)
class Settings:
    """fold: leave channels that go on to another linear in pivot order."""

    request: Request
    fold: bool

    def as_json(self) -> dict[str, Any]:
        """What decides the bytes beside the source and the dtype."""
        return {"fold": True} if self.fold else {}
