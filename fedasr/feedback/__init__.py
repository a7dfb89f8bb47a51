"""Learning from users' corrections: edits, filters, weighted aggregation, joint training."""
