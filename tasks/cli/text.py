"""What a person reads and copies: commands that a shell takes back, and messages of one line."""

import shlex
import sys


def command(*words: object) -> str:
    """Words as a command line that a shell splits into the same words again, in printable characters on one line."""
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # $'...': control characters, and the bytes that are no UTF-8 (lone surrogates) of a file's name
    return "$'" + "".join(_escaped(c) for c in word) + "'"


def _escaped(character: str) -> str:
    if character.isprintable():
        return "\\" + character if character in "\\'" else character
    escapes = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", escapes))


def one_line(text: object) -> str:
    """A message without line breaks and whatever cannot be written."""
    return " ".join(str(text).encode("utf-8", "backslashreplace").decode().splitlines())


def message(error: Exception) -> str:
    """What a ConfigError says; one that a data worker raised comes with torch's account of it around."""
    text = str(error)
    return one_line(text.rpartition("ConfigError: ")[2] if text.startswith("Caught ") else text)


def write_anything() -> None:
    """Lets stdout take names of files that are no UTF-8, and any text where the terminal knows ASCII only."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
