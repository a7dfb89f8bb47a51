"""`fedasr compile`, from a clone: see `fedasr.cli.compile`."""

from fedasr.cli.compile import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
