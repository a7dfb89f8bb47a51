"""The command `fedasr NAME --flags`: one program for each thing that is done from a shell."""
