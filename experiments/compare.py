"""`fedasr compare`, from a clone: see `fedasr.cli.compare`."""

from fedasr.cli.compare import main

if __name__ == "__main__":
    main()
