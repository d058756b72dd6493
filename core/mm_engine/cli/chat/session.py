"""The conversation's loop: read, ask, show, remember."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType

import typer

from mm_engine.cli.chat.commands import HELP, Command, parse_command, paths_in
from mm_engine.cli.chat.messages import Message, Model, Turn
from mm_engine.cli.chat.reading import Reader
from mm_engine.cli.chat.showing import Shown, remark, write
from mm_engine.cli.pictures import Picture, open_picture
from mm_engine.errors import MMEngineError, RequestError
from mm_engine.plugins.printable import printable
from mm_engine.sampling_params import SamplingParams


class Session:
    """One conversation. Where nobody types (not `interactive`), answers are all that it prints."""

    def __init__(
        self, model: Model, params: SamplingParams, system: str, *, interactive: bool
    ) -> None:
        self._model = model
        self._params = params
        self._system = system
        self._interactive = interactive
        self._reader = Reader(interactive=interactive)
        self._turns: list[Turn] = []
        self._pictures: list[Picture] = []  # for the next message
        self._unanswered: Message | None = None  # the last question, if it came to nothing
        self._num_asked = 0

    def run(self) -> int:
        """Talk until the user leaves; returns the exit code: 1 if a script's line failed."""
        failed = False
        while True:
            try:
                entry = self._reader.read()
                if entry.is_command:
                    command = parse_command(entry.text)
                    if command.name == "/exit":
                        break
                    self._obey(command)
                elif entry.text:
                    question = Message("user", entry.text, tuple(self._pictures))
                    self._pictures.clear()
                    self._ask(question, self._turns)
            except EOFError:
                if self._interactive:
                    write("\n")
                break
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                write("\n")
                remark("/exit or Ctrl-D leaves")
            except MMEngineError as error:
                failed = True
                self._tell(error)
        return int(failed and not self._interactive)

    def _obey(self, command: Command) -> None:
        match command.name:
            case "/image":
                self._attach(command.argument)
            case "/system":
                self._system = command.argument
                self._remark("system message set" if command.argument else "no system message")
            case "/retry":
                self._retry()
            case "/undo":
                if not self._turns:
                    raise RequestError("there is nothing to forget: no question was answered yet.")
                self._turns = self._turns[:-1]
                self._unanswered = None
                self._remark(f"forgotten; questions that are left: {len(self._turns)}")
            case "/clear":
                self._turns, self._unanswered = [], None
                self._pictures.clear()
                self._remark("forgotten: the conversation begins anew")
            case _:
                self._remark(HELP)

    def _attach(self, argument: str) -> None:
        pictures = [open_picture(path) for path in paths_in(argument)]  # all of them or none
        for picture in pictures:
            self._pictures.append(picture)
            width, height = picture.image.size
            size = f"{width} × {height}, {-(-len(picture.encoded) // 1024):,} KiB"
            number = f", picture {len(self._pictures)}" if len(self._pictures) > 1 else ""
            self._remark(f"attached to the next message{number}: {picture.path.name} ({size})")

    def _retry(self) -> None:
        if self._unanswered is not None:
            self._ask(self._unanswered, self._turns)
        elif self._turns:
            self._ask(self._turns[-1].question, self._turns[:-1])
        else:
            raise RequestError("there is no question to ask again. Ask one.")

    def _ask(self, question: Message, before: list[Turn]) -> None:
        """Have `question` answered after the turns `before`; both are remembered if it is.

        Raises:
            MMEngineError: it isn't.
        """
        system = [Message("system", self._system)] if self._system else []
        said = [message for turn in before for message in (turn.question, turn.answer)]
        params = replace(self._params, seed=(self._params.seed or 0) + self._num_asked)
        self._num_asked += 1
        self._unanswered = question
        shown, stopped = Shown(), False
        try:
            with one_interrupt() if self._interactive else contextlib.nullcontext():
                pieces = self._model.answer([*system, *said, question], params)
                with contextlib.closing(pieces):
                    for piece in pieces:
                        shown.add(piece)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            stopped = True
        finally:
            if shown.text:  # an error begins a line of its own, too
                write("\n")
        if not shown.text:
            write("\n")
        if stopped and not shown.text:
            remark("stopped before it began: the question is forgotten. /retry asks it again")
            return
        self._turns = [*before, Turn(question, Message("assistant", shown.text))]
        self._unanswered = None
        self._remark(shown.status(stopped=stopped))

    def _tell(self, error: MMEngineError) -> None:
        said = " ".join(str(error).split())
        if getattr(error, "code", None) == "context_length_exceeded" and self._turns:
            said += " /undo and /clear forget what was said before."
        typer.secho(f"error: {printable(said)}", fg="red", err=True)

    def _remark(self, text: str) -> None:
        if self._interactive:
            remark(text)


@contextlib.contextmanager
def one_interrupt() -> Iterator[None]:
    """Inside, the first Ctrl-C raises `KeyboardInterrupt`; others don't disturb what it ends."""
    came = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if not came:
            came = True
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
