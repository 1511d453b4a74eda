"""Typed methods: the name of a method together with the types of its request and answer.

A caller and a handler share one `Method` constant, so the type checker sees a wrong argument on either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Answer]):
    """One unary method.

    Attributes:
        name: ``service.method`` on the wire.
        request: the dataclass of its request.
        answer: the dataclass of its answer.
    """

    name: str
    request: type[Request]
    answer: type[Answer]


@dataclass(frozen=True, slots=True)
class Empty:
    """A request or an answer that says nothing but that it happened."""
