"""Who is served: errors by user and group, alignments, confusions, and tests between two runs."""
