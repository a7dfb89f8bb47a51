"""`fedasr transcribe`, from a clone: see `fedasr.cli.transcribe`."""

from fedasr.cli.transcribe import main

if __name__ == "__main__":
    main()
