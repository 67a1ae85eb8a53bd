"""The whole stack on one machine."""

from stillhouse.embedded import EmbeddedPostgres, EmbeddedRedis

__all__ = ["EmbeddedPostgres", "EmbeddedRedis"]
