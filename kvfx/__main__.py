"""`python -m kvfx`: the command line."""

from kvfx.cli import main

if __name__ == "__main__":
    main()
