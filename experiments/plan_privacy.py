"""`fedasr plan`, from a clone: see `fedasr.cli.plan`."""

from fedasr.cli.plan import main

if __name__ == "__main__":
    main()
