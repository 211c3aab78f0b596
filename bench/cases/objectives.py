"""Objectives over the head's outputs."""

from __future__ import annotations

from ..case import Case

CASES: tuple[Case, ...] = ()
