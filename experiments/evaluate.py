"""`fedasr evaluate`, from a clone: see `fedasr.cli.evaluate`."""

from fedasr.cli.evaluate import main

if __name__ == "__main__":
    main()
