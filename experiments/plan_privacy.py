"""`fedasr plan`, from a clone: see `fedasr.cli.plan`."""

from fedasr.cli.plan import main, plan

__all__ = ["main", "plan"]

if __name__ == "__main__":
    main()
