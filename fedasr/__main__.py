"""`python -m fedasr NAME --flags` is the command `fedasr NAME --flags`."""

from fedasr.cli.main import main

if __name__ == "__main__":
    main()
