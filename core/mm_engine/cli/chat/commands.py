"""Lines that begin with a slash: which there are, what one means, what Tab makes of it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from mm_engine.errors import RequestError


@dataclass(frozen=True, slots=True)
class Command:
    """A command and what comes after it."""

    name: str
    argument: str


#: For each command what comes after it, and what it does.
COMMANDS = {
    "/image": ("PATH", "attach a picture to the next message; again, or PATH PATH, for more"),
    "/system": ("TEXT", "set the system message; without TEXT there is none"),
    "/retry": ("", "ask the last question again, with its pictures"),
    "/undo": ("", "forget the last question and its answer"),
    "/clear": ("", "forget the conversation, and pictures that weren't sent yet"),
    "/help": ("", "show this"),
    "/exit": ("", "leave; Ctrl-D does, too"),
}
HELP = "\n".join(
    [
        *(f"{f'{name} {what}':<14}{meaning}" for name, (what, meaning) in COMMANDS.items()),
        'A line that ends in \\ goes on in the next, and so does all between """ and """.',
        "Ctrl-C stops an answer; what was said of it stays. A space before a / sends it as text.",
    ]
)


def parse_command(line: str) -> Command:
    """What a line that begins with a slash asks for.

    Raises:
        RequestError: there is no such command, or it lacks something.
    """
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    name = {"/quit": "/exit", "/?": "/help"}.get(name, name)
    if name not in COMMANDS:
        raise RequestError(
            f"no such command: {name}. /help lists them; to send it as text, put a space before it."
        )
    if name == "/image" and not argument:
        raise RequestError("/image lacks a path. Write /image picture.png.")
    if argument and not COMMANDS[name][0]:
        raise RequestError(f"{name} takes nothing after it: {argument}. Leave it out.")
    return Command(name, argument)


def paths_in(argument: str) -> list[Path]:
    """The files that somebody means: one as it is written, or several as a shell reads them.

    So a name with spaces needs no quotes, and one that a file manager has quoted works.
    """
    whole = _expanded(argument)
    if whole.exists():
        return [whole]
    try:
        words = shlex.split(argument)
    except ValueError:  # a quote without its other half
        words = [argument]
    return [_expanded(word) for word in words]


def completions(line: str) -> list[str]:
    """The lines that Tab can make of one: a command's name, or a path after `/image`."""
    name, space, argument = line.partition(" ")
    if not space:
        named = [command for command in COMMANDS if line and command.startswith(line)]
        return [f"{command} " if COMMANDS[command][0] else command for command in named]
    if name != "/image":
        return []
    quote = argument[:1] if argument[:1] in ("'", '"') else ""
    folder, slash, start = argument[len(quote) :].rpartition("/")
    if not slash and start == "~":
        return [f"{name} {quote}~/"]
    found = []
    for path in _listed(_expanded(f"{folder}{slash}" or ".")):
        hidden = path.name.startswith(".") and not start.startswith(".")
        if path.name.startswith(start) and not hidden:
            end = "/" if path.is_dir() else quote
            found.append(f"{name} {quote}{folder}{slash}{path.name}{end}")
    return found


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~name of nobody
        return Path(text)
