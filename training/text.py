"""Read text files, plain or .xz, and refuse held-out ones as training data."""

import lzma
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_WORDS = ("valid", "test", "heldout", "held-out", "held_out")


class TrainingError(Exception):
    """A mistake in the inputs; the message says what was wrong and what to do."""


def refuse_held_out(paths: list[Path]) -> None:
    """Raise if a file's name (or the name a link points to) says that it is held-out text."""
    for path in paths:
        names = {path.name.lower(), path.resolve().name.lower()}
        if any(word in name for name in names for word in HELD_OUT_WORDS):
            raise TrainingError(
                f"{path} is named as held-out text and is never trained on; "
                "pass training files only, or rename the file if its name misleads"
            )


def read_text(path: Path) -> str:
    """Return the whole text of a UTF-8 file, decompressing .xz; line ends are kept as they are."""
    if not path.is_file():
        raise TrainingError(f"{path} is not a file; check the path")
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        return data.decode("utf-8")
    except lzma.LZMAError as error:
        raise TrainingError(f"{path} is not a valid .xz file ({error}); copy it again") from None
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path} is not UTF-8 ({error}); convert it first") from None


def chunks(text: str, size: int) -> Iterator[str]:
    """Split text into pieces of about ``size`` characters.

    A piece ends after a line break that a non-space character follows. The tokenizer never joins
    across such a place, so encoding the pieces gives the same tokens as encoding the whole.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        while end < len(text) and not (text[end - 1] == "\n" and not text[end].isspace()):
            end += 1
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def base_name(path: Path) -> str:
    """Return the file name without .xz and .txt: part-0.txt.xz gives part-0."""
    return path.name.removesuffix(".xz").removesuffix(".txt")
