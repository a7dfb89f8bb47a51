"""The faults of privacy that the suite must notice: where, what breaks, which test turns red.

A new mechanism gets faults of its own here. The tests chosen are quick; others may notice, too.
"""

import dataclasses
import sys

planting = sys.modules["_planting"]
Edit, Value = planting.Edit, planting.Value

AREAS = (
    "accounting",
    "adaptive votes",
    "algorithms",
    "clipping",
    "correlated noise",
    "counters",
    "identity and streams",
    "ledger",
    "local parameters",
    "noise",
    "participation",
    "released histograms",
    "resume, stages, memory",
    "sampling",
    "tails",
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """`changes` are planted together; every test of `caught_by` must then fail."""

    area: str
    name: str
    breaks: str
    changes: tuple
    caught_by: tuple[str, ...]


def edit(area, name, breaks, target, old, new, *tests):
    return Fault(area, name, breaks, (Edit(target, old, new),), tests)


MECHANISM = "fedasr.privacy.mechanism"
ADAPTIVE = "fedasr.privacy.adaptive"
NOISE = "fedasr.privacy.noise"
SIMULATION = "fedasr.federated.simulation"
COHORT = "fedasr.federated.cohort:make_cohort"
SAMPLING = "fedasr.privacy.sampling"
BUILDERS = "fedasr.training.builders"
FEDERATED = "fedasr.training.trainers.federated"
SESSION = "fedasr.training.session"
LEDGERS = "fedasr.training.ledgers"
LEDGER = "fedasr.privacy.ledger"
STREAMS = "fedasr.streams"

KEYS = "tests/privacy/test_noise_keys.py"
OF_NOISE = "tests/privacy/test_noise.py"
OF_MECHANISM = "tests/privacy/test_mechanism.py"
OF_ADAPTIVE = "tests/privacy/test_adaptive.py"
OF_CORRELATED = "tests/privacy/test_correlated.py"
OF_CLIPPING = "tests/privacy/test_clipping.py"
OF_LEDGER = "tests/privacy/test_ledger.py"
OF_SENSITIVITY = "tests/federated/test_sensitivity.py"
OF_ALGORITHMS = "tests/federated/test_algorithm_references.py"
STACKED = "tests/federated/test_stacked_server.py"
OF_SIMULATION = "tests/federated/test_simulation.py"
OF_SAMPLING = "tests/privacy/test_sampling.py"
OF_STREAMS = "tests/test_streams.py"
OF_RUNS = "tests/training/test_run_privacy.py"
OF_CORRECTIONS = "tests/experiments/test_corrections.py"
OF_ANALYTICS = "tests/feedback/test_analytics.py"
OF_HISTOGRAMS = "tests/feedback/test_histograms.py"

ADD_NOISE = "fedasr.privacy.gaussian:add_gaussian_noise"
ROUNDS_KEY = "jax.random.fold_in(key, state.count)"
LAW = "tests/federated/test_server.py::test_noise_joins_the_mean_before_the_optimizer"
STAGES = f"{OF_RUNS}::test_stages_halvings_and_stops_go_on_with_the_noise"
CHAIN = f"{OF_RUNS}::test_runs_behind_a_model_are_charged_and_share_no_noise"
ALONE = f"{OF_RUNS}::test_a_model_without_a_ledger_has_no_total"
SECRET = f"{OF_RUNS}::test_a_secret_root_is_kept_on_resume_and_written_nowhere_else"
PUBLISHED = (
    f"{OF_CORRECTIONS}::test_what_a_private_run_publishes_has_the_noise_that_its_epsilon_counts"
)
PARENT = f"{OF_STREAMS}::test_a_chained_run_shares_no_draw_with_its_parent"
OS_ROOT = (
    f"{OF_STREAMS}::test_a_secret_root_is_the_operating_systems_and_its_name_does_not_give_it_away"
)
EVENTS = f"{OF_SAMPLING}::test_events_state_the_sampling"
TURNS = f"{OF_CORRELATED}::test_events_without_amplification"

REFUSED = "tests/federated/test_local.py::test_paths_from_user_to_user_are_refused_under_noise"
SLOW = {STAGES, CHAIN, SECRET}

# fmt: off
FAULTS = (
    # ------------------------------------------------------------------------------------ counters
    edit("counters", "noise comes again after 256 rounds", "a difference is without noise",
         ADD_NOISE, ROUNDS_KEY, "jax.random.fold_in(key, state.count & 0xFF)",
         f"{KEYS}::test_no_two_rounds_share_a_key[None]"),
    edit("counters", "noise comes again after 65,536 rounds", "as before, only later",
         ADD_NOISE, ROUNDS_KEY, "jax.random.fold_in(key, state.count % 65_536)",
         f"{KEYS}::test_no_two_rounds_share_a_key[None]"),
    edit("counters", "noise of every two rounds is the same", "the rounds' difference is exact",
         ADD_NOISE, ROUNDS_KEY, "jax.random.fold_in(key, state.count // 2)",
         f"{KEYS}::test_no_two_rounds_share_a_key[None]"),
    edit("counters", "the noise's counter stands still", "every round has the same noise",
         ADD_NOISE, "optax.safe_increment(state.count)", "state.count",
         f"{KEYS}::test_no_two_leaves_share_draws"),
    edit("counters", "the votes' noise comes again after 256 rounds", "bounds tell the votes",
         f"{ADAPTIVE}:adapt_scales", ROUNDS_KEY, "jax.random.fold_in(key, state.count & 0xFF)",
         f"{KEYS}::test_no_two_rounds_share_a_key_of_the_votes"),
    edit("counters", "clients' randomness comes again after 256 rounds", "rounding, dropout repeat",
         f"{SIMULATION}:Simulation.__init__", "fold_in(key(root, Stream.CLIENTS), round)",
         "fold_in(key(root, Stream.CLIENTS), round & 0xFF)",
         f"{KEYS}::test_no_two_rounds_or_users_share_a_clients_key"),
    edit("counters", "users 256 apart share a key", "two clients' randomness is one",
         COHORT, "jax.random.fold_in(round_key, user)",
         "jax.random.fold_in(round_key, user & 0xFF)",
         "tests/federated/test_cohort.py::test_randomness_belongs_to_the_user_and_the_round"),
    # --------------------------------------------------------------------------------------- noise
    edit("noise", "leaves share their draws", "the difference of two leaves is exact",
         f"{NOISE}:_cut", "drawn[..., end - size : end]", "drawn[..., :size]",
         f"{KEYS}::test_no_two_leaves_share_draws"),
    edit("noise", "stacked blocks share their draws", "the difference of two blocks is exact",
         f"{NOISE}:normal_like", "reshape(count, -1)[row]", "reshape(count, -1)[0 * row]",
         f"{STACKED}::test_a_block_gets_its_own_draws[12]",
         f"{STACKED}::test_the_noise_of_a_round_has_the_scale_that_is_claimed"),
    edit("noise", "stacked blocks have none", "all of the blocks are released as they are",
         f"{NOISE}:normal_like", "_cut(rows, blocks)", "_cut(0 * rows, blocks)",
         f"{STACKED}::test_noise_is_added_once_to_every_number",
         f"{STACKED}::test_a_round_with_nobody_has_the_same_noise"),
    edit("noise", "vectors and scalars have none", "biases are released as they are",
         ADD_NOISE, "(leaf.astype(jnp.float32) + z)",
         "(leaf.astype(jnp.float32) + (z if leaf.ndim > 1 else 0 * z))",
         f"{OF_NOISE}::test_every_number_of_every_leaf_gets_noise_in_every_round[None]"),
    edit("noise", "leaves of low precision have none", "bfloat16 variables are released",
         ADD_NOISE, "(leaf.astype(jnp.float32) + z)",
         "(leaf.astype(jnp.float32) + (z if leaf.dtype == jnp.float32 else 0 * z))",
         f"{OF_NOISE}::test_every_number_of_every_leaf_gets_noise_in_every_round[None]"),
    edit("noise", "the mean's deviation is divided by the cohort again", "too little noise",
         f"{MECHANISM}:Mechanism.noise_std", "self.clip_norm * self.sigma",
         "self.clip_norm * self.sigma / self.sampler.expected_cohort", LAW),
    edit("noise", "noise is added before the division", "too little noise",
         f"{MECHANISM}:Mechanism.server_transform", "return optax.chain(*steps)",
         "return optax.chain(steps[1], steps[0], *steps[2:])", LAW),
    edit("noise", "noise is added twice", "utility is lost, silently",
         f"{MECHANISM}:Mechanism.server_transform", "return optax.chain(*steps)",
         "return optax.chain(*steps[:2], *steps[1:])", LAW),
    edit("noise", "the noise forgets the clip norm", "too little noise where C is above 1",
         f"{MECHANISM}:Mechanism.noise_std", "self.clip_norm * self.sigma", "self.sigma", LAW),
    edit("noise", "empty rounds have no noise", "a round without noise says that nobody was there",
         f"{SIMULATION}:Simulation.run",
         "state = self._step(state, self._delta(state, total), **self._votes(state, total))",
         "state = state._replace(round=state.round + 1) if total is None else self._step("
         "state, self._delta(state, total), **self._votes(state, total))",
         f"{OF_SIMULATION}::test_an_empty_round_still_gets_noise_and_a_server_step"),
    edit("noise", "the mean is over the realised cohort", "sensitivity depends on who takes part",
         f"{SIMULATION}:Simulation._delta", "else total.delta",
         "else jax.tree.map(lambda d: d * (self.mechanism.sampler.expected_cohort"
         " / jnp.maximum(total.clients, 1)), total.delta)",
         f"{OF_SIMULATION}::test_the_mean_is_over_the_expected_cohort_not_the_realised"),
    # --------------------------------------------------------------------------------------- tails
    Fault("tails", "the reach ends beside the user", "outcomes that only the user can explain",
          (Value(f"{NOISE}:_MARGIN", 2.0),),
          (f"{OF_NOISE}::test_what_the_tails_cost_is_far_below_any_delta_in_use[mechanism0]",)),
    edit("tails", "one word of bits for each draw", "the tail ends at 6.8 whatever is asked",
         f"{NOISE}:standard_normal", "draws = _draws(reach)", "draws = 1",
         f"{OF_NOISE}::test_every_draw_ends_where_it_is_said_to"),
    edit("tails", "JAX's own normal draws", "the tail ends at 5.42",
         f"{NOISE}:normal_like", "standard_normal(key, _size(tree), reach)",
         "jax.random.normal(key, (_size(tree),))",
         f"{OF_NOISE}::test_noise_is_drawn_as_far_as_its_claim_needs[None]"),
    edit("tails", "the reach is for nobody's shift", "with little noise the user lies beyond it",
         f"{MECHANISM}:Mechanism.server_transform", "noise.reach_for(self._shift())",
         "noise.reach_for(0.0)",
         f"{OF_NOISE}::test_noise_is_drawn_as_far_as_its_claim_needs[None]"),
    edit("tails", "the votes' reach is for nobody's shift", "a vote lies beyond it",
         f"{ADAPTIVE}:adapt_scales", "1 / votes_noise if votes_noise else 0.0", "0.0",
         f"{OF_NOISE}::test_noise_is_drawn_as_far_as_its_claim_needs[None]"),
    edit("tails", "the floor is never compared with delta", "a delta is claimed that noise has not",
         f"{MECHANISM}:Mechanism.check_delta", "if floor > _TAIL_SHARE * delta:", "if floor > 1:",
         f"{OF_NOISE}::test_noise_that_reaches_too_short_is_refused"),
    # ------------------------------------------------------------------------------------ clipping
    edit("clipping", "every layer may have all of C", "a user moves the sum by C sqrt(layers)",
         "fedasr.privacy.clipping:_bounds", "np.sqrt(weights / weights.sum())",
         "np.sqrt(weights / weights.max())", f"{OF_CLIPPING}::test_bounds_follow_the_paper"),
    edit("clipping", "the global clip lets 2 C pass", "twice the sensitivity that is accounted for",
         "fedasr.privacy.clipping:clip_all", "np.float32(clip_norm * (1 - MARGIN))",
         "np.float32(2 * clip_norm)", f"{OF_MECHANISM}::test_client_transform_clips_as_stated"),
    edit("clipping", "what is not finite passes", "one client's NaN is in the model",
         "fedasr.privacy.norms:select", "return jnp.where(finite, chosen, jnp.zeros_like(x))",
         "return chosen", f"{OF_CLIPPING}::test_a_non_finite_update_becomes_zero_and_is_flagged"),
    edit("clipping", "clients that are not finite count", "figures are of who sent nothing",
         COHORT, "present, finite = num_steps > 0, stats.finite",
         "present, finite = num_steps > 0, jnp.bool_(True)",
         f"{OF_SIMULATION}::test_clipping_and_invalid_clients_are_reported"),
    edit("clipping", "a device's weight may exceed 1", "a user moves the sum by the weight times C",
         COHORT, "jnp.clip(said.astype(jnp.float32), 0.0, 1.0)", "said.astype(jnp.float32)",
         f"{OF_SENSITIVITY}::test_weights_do_not_raise_what_a_user_moves[global-float32-1-1]"),
    edit("clipping", "users' weights are not checked", "a user moves the sum by the weight times C",
         f"{MECHANISM}:Mechanism.check_weights", "if not ((weights >= 0) & (weights <= 1)).all():",
         "if False:", f"{OF_MECHANISM}::test_bounded_weights_are_checked_and_keep_the_mechanism"),
    edit("clipping", "adaptive bounds clip nothing", "no bound on what a user sends",
         f"{ADAPTIVE}:clip_scaled", "scaled, inner = clip.update(scaled, ClipState(*state[:3]))",
         "inner = clip.update(scaled, ClipState(*state[:3]))[1]",
         f"{OF_ADAPTIVE}::test_a_scaled_clip_is_a_clip_at_the_scaled_bound[1.0-uniform]"),
    # ------------------------------------------------------------------------------ adaptive votes
    edit("adaptive votes", "votes have no noise", "the bounds tell who was clipped",
         f"{ADAPTIVE}:adapt_scales", "std * drawn", "0 * drawn",
         f"{OF_ADAPTIVE}::test_votes_have_the_stated_noise"),
    edit("adaptive votes", "their noise forgets the number of bounds", "too little for m layers",
         f"{ADAPTIVE}:adapt_scales", "math.sqrt(bounds) / 2", "1 / 2",
         f"{OF_ADAPTIVE}::test_votes_have_the_stated_noise"),
    edit("adaptive votes", "their noise has the key of the sum's", "one tells the other",
         f"{SIMULATION}:Simulation._chain", "key(root, Stream.VOTES)", "key(root, Stream.NOISE)",
         f"{OF_STREAMS}::test_no_key_is_drawn_from_twice_in_a_run[adaptive1]"),
    edit("adaptive votes", "they are not accounted for", "a query is missing in the event",
         f"{MECHANISM}:Mechanism._rounds_event",
         "math.inf if self.adaptive is None else self.adaptive.noise_multiplier", "math.inf",
         f"{OF_ADAPTIVE}::test_the_votes_are_accounted_for"),
    # ---------------------------------------------------------------------------- correlated noise
    edit("correlated noise", "votes are one query for all turns", "their noise is too little",
         f"{MECHANISM}:Mechanism._rounds_event", "count_noise / math.sqrt(turns)", "count_noise",
         f"{OF_CORRELATED}::test_votes_are_fresh_queries_under_correlated_noise[9]"),
    edit("correlated noise", "a user has one turn", "all the others are not accounted for",
         f"{MECHANISM}:Mechanism._rounds_event",
         "sensitivity(self.correlation, rounds, self.sampler.separation, turns)",
         "sensitivity(self.correlation, rounds, self.sampler.separation, 1)", TURNS),
    edit("correlated noise", "bands may be wider than the separation", "turns overlap unaccounted",
         f"{MECHANISM}:Mechanism._check_correlation", "correlation.bands > sampler.separation",
         "False", f"{OF_CORRELATED}::test_combinations_that_nobody_can_account_for_are_refused"),
    edit("correlated noise", "turns are twice as far apart", "the sensitivity is too small",
         "fedasr.privacy.correlated:sensitivity", "start = turn * separation",
         "start = min(2 * turn * separation, rounds - 1)",
         f"{OF_CORRELATED}::test_sensitivity_is_the_worst_pattern_of_turns[banded-2-2]"),
    edit("correlated noise", "the buffers are never filled", "later rounds take nothing back",
         ADD_NOISE, "drawn, buffers = inverse.multiply_next(drawn, buffers)",
         "drawn, _ = inverse.multiply_next(drawn, buffers)",
         f"{OF_CORRELATED}::test_the_fresh_noise_comes_back[banded]"),
    # ------------------------------------------------------------------------------------ sampling
    edit("sampling", "cohorts come again after 256 rounds", "rounds are not independent",
         f"{SAMPLING}.draws:round_generator", "seed, round)", "seed, round & 0xFF)",
         f"{OF_SAMPLING}::test_no_round_has_the_cohort_of_another[PoissonSampler]"),
    edit("sampling", "every cohort is used twice", "rounds are not independent",
         f"{SAMPLING}.draws:round_generator", "seed, round)", "seed, round // 2)",
         f"{OF_SAMPLING}::test_rounds_and_seeds_differ[sampler0]"),
    edit("sampling", "seed and round are added up", "the next seed has the next round's cohort",
         f"{SAMPLING}.draws:round_generator", "seed, round)", "seed + round)",
         f"{OF_SAMPLING}::test_no_round_has_the_cohort_of_another[PoissonSampler]"),
    edit("sampling", "cohorts follow from the seed alone", "chained runs meet the same cohorts",
         f"{SIMULATION}:Simulation.draws", "sampler.reseeded(seed)", "sampler",
         f"{OF_STREAMS}::test_a_secret_root_is_nobodys_and_kept_by_the_state"),
    edit("sampling", "twice as many are drawn as is said", "amplification that is not there",
         f"{SAMPLING}:PoissonSampler.cohort", "rng.binomial(size, self.sampling_probability)",
         "rng.binomial(size, min(1.0, 2 * self.sampling_probability))",
         f"{OF_SAMPLING}::test_everybody_is_equally_likely[sampler0]"),
    edit("sampling", "a Poisson cohort has a fixed size", "another event than is accounted for",
         f"{SAMPLING}:PoissonSampler.cohort", "rng.binomial(size, self.sampling_probability)",
         "int(size * self.sampling_probability)",
         f"{OF_SAMPLING}::test_poisson_users_are_independent_of_each_other"),
    edit("sampling", "overfull rounds keep the first users", "the last are never truncated",
         f"{SAMPLING}:PoissonSampler.cohort",
         "rng.choice(size, kept, replace=False, shuffle=False)",
         "np.sort(rng.choice(size, int(drawn), replace=False))[:kept]",
         f"{OF_SAMPLING}::test_overfull_rounds_are_truncated_uniformly"),
    # ---------------------------------------------------------------------------------- accounting
    edit("accounting", "truncation is left out of the event", "displacement is not accounted for",
         f"{SAMPLING}:PoissonSampler.event", "truncated_batch_size=self.slots",
         "truncated_batch_size=self.population", EVENTS),
    edit("accounting", "a fixed size moves the sum by C only", "half the sensitivity",
         f"{SAMPLING}:FixedSizeSampler.sensitivity", "return 2.0", "return 1.0", EVENTS),
    edit("accounting", "a fixed size claims another relation", "whom a user displaces is forgotten",
         f"{SAMPLING}:FixedSizeSampler.neighboring_relation", "NeighboringRelation.REPLACE_ONE",
         "NeighboringRelation.ADD_OR_REMOVE_ONE", EVENTS),
    edit("accounting", "users in turn have one turn less", "the last is not accounted for",
         f"{SAMPLING}:ShuffledSampler.participations",
         "-(-rounds * self.cohort_size // self.population)",
         "rounds * self.cohort_size // self.population",
         f"{OF_SAMPLING}::test_shuffled_users_take_turns_as_far_apart_as_stated"),
    edit("accounting", "groups come less often than they do", "turns are not accounted for",
         f"{SAMPLING}:PoissonSampler.participations", "-(-rounds // self.cycle)",
         "rounds // self.cycle",
         f"{OF_SAMPLING}::test_cyclic_poisson_samples_each_user_in_its_own_turn_only"),
    edit("accounting", "one repetition is left out", "a round is not accounted for",
         "fedasr.privacy.accounting:compose", "SelfComposedDpEvent(event, int(rounds))",
         "SelfComposedDpEvent(event, max(1, int(rounds) - 1))", TURNS),
    edit("accounting", "a run's epsilon is that of a round less", "the last round is free",
         "fedasr.training.describe:describe_privacy", 'mechanism.epsilon(rounds, privacy.delta)',
         'mechanism.epsilon(max(rounds - 1, 0), privacy.delta)', ALONE),
    edit("accounting", "a run's epsilon is at another delta", "it is said of the one asked for",
         "fedasr.training.describe:describe_privacy", 'mechanism.epsilon(rounds, privacy.delta)',
         "mechanism.epsilon(rounds, 1e-4)", ALONE),
    edit("accounting", "the noise is taken to be larger than it is", "epsilon is too small",
         f"{MECHANISM}:_joint", "return least / math.sqrt", "return 1.01 * least / math.sqrt",
         ALONE),
    edit("accounting", "a deployment keeps the votes' noise", "it has not that of its own cohort",
         f"{MECHANISM}:Mechanism.deployed", "adaptive.noise_multiplier * growth",
         "adaptive.noise_multiplier * growth**2",
         f"{OF_ADAPTIVE}::test_the_votes_are_accounted_for"),
    edit("accounting", "noise is calibrated for more than is asked", "the target is exceeded",
         "fedasr.privacy.accounting:calibrate_noise", "target_epsilon, guess or 1.0",
         "1.1 * target_epsilon, guess or 1.0",
         "tests/privacy/test_accounting.py::test_calibration_meets_the_target[sampler1]"),
    edit("accounting", "a Poisson round claims that a user is added", "q follows the population",
         f"{SAMPLING}:PoissonSampler.neighboring_relation", "REPLACE_SPECIAL", "ADD_OR_REMOVE_ONE",
         EVENTS),
    Fault("sampling", "one round in a thousand has no slot left", "users displace each other",
          (Value(f"{SAMPLING}.poisson:_FULL_ROUND", 1e-3),),
          (f"{OF_SAMPLING}::test_default_slots_are_the_fewest_that_are_hardly_ever_full",)),
    # ------------------------------------------------------------------------- released histograms
    edit("released histograms", "they are left out of the event", "two queries are free",
         f"{MECHANISM}:Mechanism.event", "if not self.released:", "if True:",
         f"{OF_MECHANISM}::test_what_was_released_before_is_accounted_for[shuffled]"),
    edit("released histograms", "the words' is exact", "noise is claimed, and none is there",
         "experiments.corrections:train", "noise_multiplier=noise,", "noise_multiplier=0.0,",
         PUBLISHED),
    edit("released histograms", "the pairs' is exact", "noise is claimed, and none is there",
         "experiments.corrections:make_corrections", "noise_multiplier=noise,",
         "noise_multiplier=0.0,", PUBLISHED),
    edit("released histograms", "they share their noise", "their difference is exact",
         "experiments.corrections:_histogram_seed", "Stream.HISTOGRAM, name)", "Stream.HISTOGRAM)",
         PUBLISHED),
    edit("released histograms", "noise forgets what one client may hold", "too little of it",
         "fedasr.feedback.histograms:client_histogram", "math.sqrt(most) * np.asarray",
         "np.asarray",
         f"{OF_HISTOGRAMS}::test_noise_is_on_every_bucket_and_of_the_stated_size"),
    edit("released histograms", "empty buckets have no noise", "a key shows by being there at all",
         "fedasr.feedback.histograms:client_histogram", "np.asarray(drawn, np.float64)",
         "np.asarray(drawn, np.float64) * (counts > 0)",
         f"{OF_HISTOGRAMS}::test_noise_is_on_every_bucket_and_of_the_stated_size"),
    edit("released histograms", "words have too little noise", "what one user holds is forgotten",
         "fedasr.feedback.analytics:discover", "noise_multiplier * math.sqrt(most), longest",
         "noise_multiplier, longest",
         f"{OF_ANALYTICS}::test_noise_is_on_every_candidate_and_of_the_stated_size"),
    edit("released histograms", "levels share their noise", "their difference is exact",
         "fedasr.feedback.analytics:discover", "seed, level)", "seed, 0)",
         f"{OF_ANALYTICS}::test_each_level_has_noise_of_its_own"),
    edit("released histograms", "levels beyond the first are free", "all were asked of all users",
         "fedasr.feedback.analytics:discover", "(noise_multiplier,) * levels)",
         "(noise_multiplier,))",
         f"{OF_ANALYTICS}::test_with_noise_it_finds_common_words_and_hardly_any_other"),
    edit("released histograms", "volumes have too little noise", "three parts count as one",
         "fedasr.feedback.analytics:volumes", "noise_multiplier * math.sqrt(3)",
         "noise_multiplier", f"{OF_ANALYTICS}::test_noise_of_volumes_is_of_the_stated_size"),
    # ------------------------------------------------------------------------ identity and streams
    edit("identity and streams", "the noise ignores seed and run", "all runs have the same noise",
         f"{SIMULATION}:Simulation._chain", "key(root, Stream.NOISE)",
         'key(make_root("noise"), Stream.NOISE)', PARENT),
    edit("identity and streams", "a run ignores what it starts from", "chained runs share draws",
         f"{SIMULATION}:Simulation.root_of", ", params_digest(params)", "", PARENT),
    edit("identity and streams", "a run ignores its data", "runs on other users share draws",
         f"{BUILDERS}.identities:run_identity",
         'tree["data"].pop("knowledge", None)', 'tree["data"] = {}',
         f"{OF_STREAMS}::test_the_identity_of_a_configuration"),
    edit("identity and streams", "a run ignores its configuration", "rows of a sweep share draws",
         f"{BUILDERS}.simulations:make_simulation",
         "identity=identities.run_identity(config)", 'identity=""',
         f"{OF_RUNS}::test_runs_that_differ_in_one_setting_share_no_noise"),
    edit("identity and streams", "streams are one", "initialisation, noise and sampling meet",
         f"{STREAMS}:key", "return jax.random.fold_in(found, np.uint32(stream))", "return found",
         f"{OF_STREAMS}::test_no_two_streams_of_a_root_or_seed_agree"),
    edit("identity and streams", "most bits of a root are dropped", "roots can be tried out",
         f"{STREAMS}:key", "range(2, ROOT_WORDS)", "range(2, 2)",
         f"{OF_STREAMS}::test_roots_tell_all_parts_apart"),
    edit("identity and streams", "a secret root can be guessed", "the noise can be taken off",
         f"{STREAMS}:secret_root", "secrets.token_bytes(4 * ROOT_WORDS)",
         "np.random.default_rng().bytes(4 * ROOT_WORDS)",
         OS_ROOT),
    edit("identity and streams", "a public name is a part of the root", "the root is given away",
         f"{STREAMS}:public_name",
         'hashlib.sha256(b"public name" + words.astype("<u4").tobytes()).hexdigest()',
         'words.astype("<u4").tobytes().hex()',
         OS_ROOT),
    edit("identity and streams", "secret noise is not asked for", "it follows from the seed",
         f"{SESSION}:Session.secret", '!= "secret"', '!= "never"', SECRET),
    edit("identity and streams", "the summary names the root itself", "the noise can be taken off",
         f"{FEDERATED}:FederatedTrainer.train", "public_name(state.root)",
         'np.asarray(state.root).astype("<u4").tobytes().hex()', SECRET),
    # ----------------------------------------------------------------- resume, stages, memory
    edit("resume, stages, memory", "a resumed run has another root", "it is not the same run",
         f"{FEDERATED}:FederatedTrainer._begin", "simulation.transfer(restored)",
         "simulation.transfer(restored._replace(root=state.root))", SECRET),
    edit("resume, stages, memory", "the noise begins anew on resume", "rounds share noise",
         f"{FEDERATED}:FederatedTrainer._begin", "simulation.transfer(restored)",
         "simulation.transfer(restored._replace(opt_state=state.opt_state))", STAGES),
    edit("resume, stages, memory", "buffers are empty after a resume", "noise is lost",
         f"{FEDERATED}:FederatedTrainer._begin", "simulation.transfer(restored)",
         "simulation.transfer(restored._replace(opt_state=jax.tree.map("
         "lambda a, b: b if a.ndim else a, restored.opt_state, state.opt_state)))", STAGES),
    edit("resume, stages, memory", "the noise begins anew with a smaller chunk",
         "rounds share noise", f"{FEDERATED}:FederatedTrainer._rounds",
         "state = self.simulations[number][1].transfer(state)",
         "new = self.simulations[number][1]; "
         "state = new.init(state.params, state.root)._replace(round=state.round)", STAGES),
    edit("resume, stages, memory", "the noise begins anew with augmentation",
         "rounds share noise", f"{FEDERATED}:FederatedTrainer._rounds",
         "until, simulation = self.simulations[number]",
         "until, simulation = self.simulations[number]; state = state if number == 0 else "
         "simulation.init(state.params, state.root)._replace(round=state.round)", STAGES),
    # -------------------------------------------------------------------------------------- ledger
    edit("ledger", "what came before the last run is forgotten", "the total is too small",
         f"{LEDGERS}:earlier_runs", '[*data["earlier"], *data["own"]]', 'data["own"]', CHAIN),
    edit("ledger", "a resumed run forgets what came before it", "the total is too small",
         f"{LEDGERS}:runs_before", 'ledger.from_data(kept["earlier"])', "[]", CHAIN),
    edit("ledger", "a model without a ledger has cost nothing", "a total is claimed",
         f"{LEDGERS}:earlier_runs", "data is None:\n        return [], False",
         "data is None:\n        return [], True", ALONE),
    edit("ledger", "a checkpoint's entry is of a round less", "the last round is free",
         f"{FEDERATED}:FederatedTrainer.entry", "config, mechanism, units,",
         "config, mechanism, max(units - 1, 0),", CHAIN),
    edit("ledger", "users who are not known are not shared", "the best case, not the worst",
         f"{LEDGER}:_charged_together", "np.ones(latest.users.count, bool)",
         "np.zeros(latest.users.count, bool)",
         f"{OF_LEDGER}::test_unknown_users_are_the_worst_case"),
    edit("ledger", "shared users are charged once", "earlier runs are free",
         f"{LEDGER}:Users.members", "np.isin(hashes, self.hashes)",
         "np.zeros(len(hashes), bool)",
         f"{OF_LEDGER}::test_chain_of_three_runs_is_charged_as_by_hand"),
    edit("ledger", "every relation gets all of delta", "the sum is at twice the delta",
         f"{LEDGER}:composed", "delta / len(by_relation)", "delta",
         f"{OF_LEDGER}::test_events_of_other_neighbours_are_added_up"),
    edit("ledger", "the best of the sets of runs counts", "the worst user is charged too little",
         f"{LEDGER}:total", "max(figures)", "min(figures)",
         f"{OF_LEDGER}::test_users_who_are_not_shared_are_not_charged_twice"),
    edit("ledger", "a search costs its first run", "all others are free",
         f"{LEDGER}:search_cost", "for e in entries], delta)", "for e in entries[:1]], delta)",
         f"{OF_LEDGER}::test_search_costs_all_its_runs"),
    # ---------------------------------------------------------------------------- local parameters
    edit("local parameters", "they leak into what is sent", "what never leaves the client does",
         "fedasr.federated.local:with_local", "return select(whole, layout.shared), metrics,",
         "return select(jax.tree.map(lambda d: d + jnp.where("
         "jnp.isfinite(row.sum()), 1e-3 * row.sum(), 0).astype(d.dtype), whole), layout.shared), "
         "metrics,",
         f"{OF_SENSITIVITY}::test_local_parameters_have_no_path_to_the_server[global-float32-1-1]"),
    edit("local parameters", "new users start from others' rows under noise", "nothing bounds that",
         f"{MECHANISM}:Mechanism.check_local", 'if prototype != "init":', "if False:", REFUSED),
    edit("local parameters", "users with rows displace each other", "rows remember who was there",
         f"{MECHANISM}:Mechanism.check_local", "overflow_probability > _NEVER",
         "overflow_probability > 1", REFUSED),
    edit("local parameters", "rows of clients that are not valid change", "garbage is kept",
         COHORT, "jnp.where(valid & jnp.all(jnp.isfinite(new)), new, local_row)", "new",
         "tests/federated/test_local.py::test_clients_that_are_not_valid_keep_what_they_had"),
    # ------------------------------------------------------------- algorithms and participation
    edit("algorithms", "what is sent beside the delta is not clipped", "a user may send anything",
         "fedasr.federated.cohort:make_cohort",
         "delta, stats = clip.update(delta, clip.init(params))",
         "clipped, stats = clip.update(delta, clip.init(params)); "
         "delta = clipped._replace(extra=delta.extra) if hasattr(delta, 'extra') else clipped",
         f"{OF_ALGORITHMS}::test_a_user_moves_the_sum_by_the_clip_norm[scaffold-global]"),
    edit("algorithms", "what is sent beside the delta gets no noise", "it is as clear as day",
         "fedasr.federated.extras:server_chain",
         "mean, noise_state = noise.update(sent, state[0], None, **extra)",
         "mean, noise_state = noise.update(sent, state[0], None, **extra); "
         "mean = mean._replace(extra=jax.tree.map(lambda x: x * 1e-9, sent.extra))",
         f"{OF_ALGORITHMS}::test_all_that_is_sent_gets_noise"),
    edit("algorithms", "an algorithm that cannot be accounted runs with noise", "its claim is void",
         "fedasr.federated.algorithms.fedexp:FedExP", 'unaccounted="fedexp', 'unaccounted="" and "',
         f"{OF_ALGORITHMS}::test_with_noise_it_trains_or_is_refused[fedexp]"),
    edit("participation", "the mean is over those who arrive", "sensitivity follows who is missing",
         f"{SIMULATION}:Simulation._delta", "else total.delta",
         "else jax.tree.map(lambda d: d * (self.mechanism.sampler.expected_cohort "
         "/ total.clients), total.delta)",
         "tests/federated/test_participation.py::"
         "test_the_server_divides_by_the_expected_cohort_whoever_is_missing"),
    edit("participation", "the first to arrive end a private round", "users displace each other",
         f"{SIMULATION}:Simulation.__init__",
         "checks.dropout_is_accounted(mechanism, self._participation, corpus)", "pass",
         "tests/federated/test_participation.py::test_what_is_refused"),
    edit("participation", "a turn of FedBuff's users is not counted", "epsilon is of fewer turns",
         f"{SAMPLING}.asynchronous:AsynchronousSampler.participations",
         "1 + (rounds - 1) // self.separation", "max(1, (rounds - 1) // self.separation)",
         "tests/federated/test_fedbuff.py::"
         "test_no_user_takes_part_more_often_than_is_accounted"),
    edit("participation", "old updates count more than new ones", "above the clip norm",
         f"{SIMULATION}:Simulation._by_age", "min(1.0, self._discount(int(age)))",
         "(1.0 + int(age)) ** 2", "tests/federated/test_fedbuff.py::"
         "test_old_updates_count_less_than_the_clip_norm"),
)
# fmt: on
