"""`fedasr train`, from a clone: see `fedasr.cli.train`."""

from fedasr.cli.train import main

if __name__ == "__main__":
    main()
