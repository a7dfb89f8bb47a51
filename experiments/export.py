"""`fedasr export`, from a clone: see `fedasr.cli.export`."""

from fedasr.cli.export import main

if __name__ == "__main__":
    main()
