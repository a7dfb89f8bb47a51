"""What the report's numbers mean, in a sentence or two each."""

MEANINGS = {
    "wer": "Word errors (substitutions, deletions, insertions of a least-cost alignment) over the "
    "words that were said, of the whole split. It may pass 100%. The interval draws the split's "
    "users again (95%, bootstrap): what other users of the same kind might have given.",
    "wer_published": "The mean of the utterances' own rates, weighted by their words and two more, "
    "of utterances of at most 30 s: how a published comparison counts.",
    "cer": "The same with characters for words; spaces between words count.",
    "initial_wer": "The word error rate of the model that the main training began with.",
    "mean": "The mean of the users' own word error rates: each user counts once, whatever they "
    "said.",
    "worst_decile": "The mean word error rate of the tenth of the users with the most errors (at "
    "least one user). A mean over the corpus hides them.",
    "sd": "Standard deviation of the users' word error rates.",
    "p50": "Half of the users are better, half worse.",
    "p10": "A tenth of the users is better.",
    "p90": "A tenth of the users is worse.",
    "gap": "Mean word error rate of the worst group less that of the best, of groups with at least "
    "two users. Of many groups the largest gap is large by chance alone: an interval that begins "
    "near 0 says little.",
    "epsilon": "How much more likely any outcome may become because one user took part: by a "
    "factor of at most e^ε, except with probability δ. This one is for the users whose speech "
    "really trained this model.",
    "deployed": "The same noise on the mean update, reached with a larger cohort out of a larger "
    "population: what a deployment would guarantee if it learned as well. It protects nobody here.",
    "rounds": "How often the server updated the model.",
    "central_steps": "Updates of the model on pooled data, those of the seed among them.",
    "cohort": "How many users were expected in each round.",
    "population": "How many users there were to be drawn.",
    "parameters": "Numbers that make the model; 4 bytes each in float32.",
    "local": "Variables that stay with each user.",
    "local_users": "Users who have trained at least once.",
    "wall_seconds": "Of the whole run with its evaluations, however often it was interrupted.",
    "client_steps_per_second": "Optimiser steps of clients, without rounds that compiled.",
    "device": "What computed.",
}
