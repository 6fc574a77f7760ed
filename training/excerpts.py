"""Cut the bundled excerpts: whole paragraphs from places spread over a text."""

import argparse
import sys
from pathlib import Path

from training.text import TrainingError, read_text

BREAK = "\n\n"


def excerpt(text: str, start: int, size: int) -> str:
    """Return whole paragraphs of about ``size`` characters from ``start`` on."""
    first = 0 if start == 0 else text.find(BREAK, start) + len(BREAK)
    last = text.rfind(BREAK, first, first + size)
    if last <= first:
        raise TrainingError("the text has too few paragraphs; ask for fewer, larger excerpts")
    return text[first:last].strip("\n")


def spread_excerpts(text: str, count: int, kilobytes: int) -> str:
    """Join ``count`` excerpts from the middles of equal parts of the text."""
    size, part = kilobytes * 1024 // count, len(text) // count
    if size * 2 > part:
        raise TrainingError("the text is too short for these excerpts; ask for fewer kilobytes")
    starts = [number * part + (part - size) // 2 for number in range(count)]
    return BREAK.join(excerpt(text, start, size) for start in starts) + "\n"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="training.excerpts", description=__doc__)
    parser.add_argument("text", type=Path, help="text, .txt or .xz")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--count", type=int, default=8, help="number of places")
    parser.add_argument("--kilobytes", type=int, default=256, help="size in all")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    try:
        text = spread_excerpts(read_text(options.text), options.count, options.kilobytes)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    except (TrainingError, OSError) as error:
        sys.exit(f"training.excerpts: {error}")
    print(f"{len(text.encode('utf-8'))} bytes written to {options.out}")


if __name__ == "__main__":
    main()
