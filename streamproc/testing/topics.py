"""The topics of a project, made for its tests: those of its files, and those that its tasks use beside them."""

from __future__ import annotations

from streamproc.broker.interface import Admin
from streamproc.broker.topics import apply, implied_topics, plan
from streamproc.runtime.startup import declared_topics
from streamproc.settings import Settings


async def create_topics(settings: Settings, admin: Admin) -> None:
    """Create them, as ``streamproc topics apply`` does. Raises SettingsError, BrokerError."""
    declared = declared_topics(settings)
    async with admin:
        wanted = {**declared, **implied_topics(settings, declared, await admin.topics())}
        await apply(await plan(wanted, admin), admin)
