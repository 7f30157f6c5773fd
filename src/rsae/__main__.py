"""`python -m rsae` is the command line."""

from rsae.cli import main

if __name__ == "__main__":
    main()
