"""``python -m dipnet``: the command line."""

from dipnet.cli import main

if __name__ == "__main__":
    main()
