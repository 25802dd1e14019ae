"""Whom a client or a server trusts, and how often a client asks, as groups of settings say it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from cleave.scripts.assembly.given.texts import check_texts, in_group, naming

if TYPE_CHECKING:
    from cleave.deployment import Retries, Trust

FILES = ("certificate", "key", "authorities", "token")


def trust_of(cfg: DictConfig, group: str = "") -> Trust:
    """Return certificates and token, looked at before anything is loaded.

    Args:
        cfg: The config.
        group: The group that names them; none: they stand by themselves.

    Raises:
        ValueError: A file is missing or of no use; the message names the setting in full.
    """
    from cleave.deployment import Trust  # needs gRPC's extra

    check_texts(cfg, {f"{group}.{key}" if group else key: "a file" for key in FILES})
    given = cfg[group] if group else cfg
    with naming(in_group(cfg, group) if group else {}):
        trust = Trust(**{key: given[key] for key in FILES}, insecure=given.insecure)
        trust.secret()
    return trust


def retries_of(cfg: DictConfig, group: str) -> Retries:
    """Return how often and how long a client asks; ValueError where a number is out of range."""
    from cleave.deployment import Retries

    with naming(in_group(cfg, group)):
        return Retries(timeout=cfg[group].timeout, attempts=cfg[group].attempts)
