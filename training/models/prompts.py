"""What stands between the acts of a take, as text: sights as they are, or in the form of a model's chat template."""

from __future__ import annotations

from typing import Any, Protocol

from shoal.protocol.errors import UsageError


class Form(Protocol):
    """How sights become text."""

    def before(self, sight: str, *, is_first: bool, is_ended: bool) -> str:
        """All that comes before an act.

        Args:
            sight: that the act answers.
            is_first: whether no act came before.
            is_ended: whether the act before said its end, so that it is not said again.
        """
        ...


class Plain:
    """Sights as they are."""

    def before(self, sight: str, *, is_first: bool, is_ended: bool) -> str:
        """The sight."""
        return sight


class Chat:
    """Sights as what a user says, acts as what the assistant does."""

    def __init__(self, tokenizer: Any) -> None:
        """Find out what the template puts where.

        Raises:
            UsageError: if there is none, or what it makes of a conversation changes as that goes on.
        """
        if not tokenizer.chat_template:
            raise UsageError("the model has no chat template; set the policy's size chat to false")
        self._tokenizer = tokenizer
        self._said = [("user", "1"), ("assistant", "2")]
        begun = self._text(self._said[:1], is_asked=True) + "2"
        self._so_far = self._text(self._said, is_asked=False)
        self._end = str(tokenizer.eos_token or "")
        going_on = self._text([*self._said, ("user", "3")], is_asked=True)
        if not self._so_far.startswith(begun) or not going_on.startswith(self._so_far):
            raise UsageError(
                "the model's chat template writes what was said anew in every turn, so what was sampled would not be "
                "what is learned from; set the policy's size chat to false"
            )
        self._closing = self._so_far.removeprefix(begun)

    def before(self, sight: str, *, is_first: bool, is_ended: bool) -> str:
        """The template around the sight."""
        if is_first:
            return self._text([("user", sight)], is_asked=True)
        whole = self._text([*self._said, ("user", sight)], is_asked=True)
        closing = self._closing.removeprefix(self._end) if is_ended else self._closing
        return closing + whole.removeprefix(self._so_far)

    def _text(self, said: list[tuple[str, str]], *, is_asked: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in said]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_asked))
