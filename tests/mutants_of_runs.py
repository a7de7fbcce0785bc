"""Faults in what a run is made of: checkpoints, recovery, callbacks, the order of data, and `model.fit`."""

from mutant import Mutant

TRAINING, FIT = "tf_dist/training", "tf_dist/keras_fit"
CHECKPOINT, SAVING = "tests/checkpoint/test_store.py", "tests/training/test_checkpoint_manager.py"
IN_PLACE, AGAIN = "tests/training/test_in_place_recovery.py", "tests/training/test_restart.py"
TRAINER, SAMPLER = "tests/training/test_trainer.py", "tests/data/test_sampler.py"
FITS, OBJECTIVE = "np 2: tests/mpi/test_fit_mpi.py", "np 3: tests/mpi/test_fit_objective_mpi.py"
CALLBACKS, TRAININGS = "np 2: tests/mpi/test_callbacks_mpi.py", "np 2: tests/mpi/test_training_mpi.py"

# fmt: off
OF_RUNS = (
    # Checkpoints ----------------------------------------------------------------------------------------
    Mutant(
        "sums-not-compared", "tf_dist/checkpoint/store.py",
        'if there != entry["bytes"] or crc != entry["crc32"]:', 'if there != entry["bytes"]:',
        "a damaged checkpoint is taken for a sound one", (CHECKPOINT,),
        caught_by="test_store.py::test_newest_walks_back_to_the_last_sound_one",
    ),
    Mutant(
        "overlaps-in-shards", "tf_dist/checkpoint/manifest.py",
        "offset != ends.get(file, 0)", "offset > ends.get(file, 0)",
        "a manifest may name bytes of a shard twice, and others never", (CHECKPOINT,),
        caught_by="test_store.py::test_hostile_manifests",
    ),
    Mutant(
        "manifest-unsorted", "tf_dist/checkpoint/shards.py",
        "for _, entry in sorted(numbered, key=lambda one: int(one[0]))]", "for _, entry in numbered]",
        "tensors stand in the order of those who wrote them", (CHECKPOINT,),
        caught_by="test_store.py::test_it_does_not_matter_how_many_have_written",
    ),
    Mutant(
        "one-too-few-kept", "tf_dist/checkpoint/store.py",
        "if step_of(path) <= step][:-keep]:", "if step_of(path) <= step][: 1 - keep or None]:",
        "one checkpoint too many is removed", (CHECKPOINT,),
        caught_by="test_store.py::test_prune_keeps_the_newest_and_removes_what_is_half_written",
    ),
    Mutant(
        "copies-overlap", "tf_dist/training/checkpoint_manager.py",
        "            offset += tensor.nbytes\n", "            offset += 0\n",
        "copies of what is saved lie in one place", (SAVING,),
        caught_by="test_checkpoint_manager.py::test_what_is_saved_is_of_its_moment",
    ),
    Mutant(
        "tokens-forgotten", "tf_dist/training/train_state.py",
        'self.count_from(saved["tokens"])', "self.count_from(0)",
        "a resumed run counts its tokens anew", (TRAININGS,),
    ),
    Mutant(
        "first-part-for-all", "tf_dist/checkpoint/sharded_state.py",
        "values = part.reshape(-1)[piece.start : piece.stop]",
        "values = part.reshape(-1)[: piece.stop - piece.start]",
        "a resumed shard takes the beginning of a tensor for its own part",
        ("np 3: tests/mpi/test_zero_mpi.py",),
    ),
    Mutant(
        "parts-that-nobody-waits-for", "tf_dist/checkpoint/sharded_state.py",
        "entry.given = all_of_it or entry.given", "entry.given = entry.given or all_of_it",
        "saving a tied weight's divided state sends parts that nobody takes",
        ("tests/checkpoint/test_sharded_state.py",),
        caught_by="test_sharded_state.py::test_a_tensor_that_one_rank_has_and_others_have_in_parts",
    ),
    # Recovery -------------------------------------------------------------------------------------------
    Mutant(
        "behind-without-state", "tf_dist/training/in_place_recovery.py",
        "        if min(steps) < max(steps):", "        if min(steps) > max(steps):",
        "after a death a rank that is a step behind keeps its old weights", (IN_PLACE,),
        caught_by="test_in_place_recovery.py::test_who_is_behind_takes_over_all_that_a_step_has_changed",
    ),
    Mutant(
        "nothing-shared-anew", "tf_dist/training/in_place_recovery.py",
        "        self._redistribute()\n", "",
        "nobody takes over the micro-batches of a rank that has died", (IN_PLACE,),
        caught_by="test_in_place_recovery.py::test_a_phase_is_begun_again_together",
    ),
    Mutant(
        "too-few-go-on", "tf_dist/training/restart.py",
        "        if comm.size < min_ranks:", "        if comm.size < min_ranks - 1:",
        "a run goes on with fewer ranks than --min-ranks", (AGAIN, IN_PLACE),
        caught_by="test_restart.py::test_too_few_are_left",
    ),
    Mutant(
        "half-a-copy", "tf_dist/training/in_memory_checkpoint.py",
        "whole = [when for when in found if owners[when] <= set(found[when].holder_of)]",
        "whole = list(found)",
        "copies in memory of which a part is lost are gone on from",
        ("tests/training/test_in_memory_checkpoint.py",),
        caught_by="test_in_memory_checkpoint.py::test_a_rank_and_who_has_its_copy",
    ),
    Mutant(
        "bad-steps-add-up", f"{TRAINING}/nonfinite_gradients.py",
        "            state.skipped.in_a_row = 0\n", "            state.skipped.in_a_row += 0\n",
        "skipped steps with good ones between them end a run", (TRAINER,),
        caught_by="test_trainer.py::test_a_bad_step_uses_up_its_batch_and_changes_nothing",
    ),
    Mutant(
        "spike-taken-again", "tf_dist/training/loss_spikes.py",
        "batch_of(spike - 1) + 1 + self.skip", "batch_of(spike - 1) + self.skip",
        "after a roll-back one batch too few is passed over", ("tests/training/test_loss_spikes.py",),
        caught_by="test_loss_spikes.py::test_batches_that_are_passed_over",
    ),
    Mutant(
        "restored-from-whoever-differs", "tf_dist/training/consistency_check.py",
        "for rank in group if rank not in found.outvoted)", "for rank in group if rank in found.outvoted)",
        "the rank that differs is the one that the others are restored from",
        ("tests/training/test_consistency_check.py", "np 3: tests/mpi/test_consistency_check_mpi.py"),
    ),
    # Callbacks ------------------------------------------------------------------------------------------
    Mutant(
        "only-rank-0-stops", "tf_dist/keras_callbacks/callback_list.py",
        "shared[0] = self._held_back or self.model.stop_training",
        "shared[0] = self.comm.rank == 0 and self.model.stop_training",
        "a wish to stop of another rank than the first is not heard", (CALLBACKS,),
    ),
    Mutant(
        "all-ranks-write", "tf_dist/keras_callbacks/callback_list.py",
        "if comm.rank == 0 or not is_writer(one)]", "if comm.rank >= 0 or not is_writer(one)]",
        "every rank writes the files of callbacks", (CALLBACKS,),
    ),
    Mutant(
        "row-not-weighed", "tf_dist/training/train_state.py",
        "self.loss_sum += loss * tokens", "self.loss_sum += loss",
        "the loss of a row of metrics is not the mean over its tokens",
        ("tests/run/test_run_callbacks.py",),
    ),
    Mutant(
        "epoch-not-weighed", "tf_dist/training/loop.py",
        'sums[name] += logs[name] * logs["tokens"]', "sums[name] += logs[name]",
        "the loss of an epoch is not the mean over its tokens", (TRAINER,),
        caught_by="test_trainer.py::test_the_loss_of_an_epoch_is_weighed_by_tokens",
    ),
    # The order of data ----------------------------------------------------------------------------------
    Mutant(
        "one-beyond-the-data", "tf_dist/data/sampler.py",
        "while (outside := values >= self.n).any():", "while (outside := values > self.n).any():",
        "a sequence that is not there is drawn", (SAMPLER,),
        caught_by="test_sampler.py::test_golden_order",
    ),
    Mutant(
        "block-of-the-last-epoch", "tf_dist/data/sampler.py",
        "if last is None or last[0] != (epoch, block):", "if last is None or last[0][1] != block:",
        "every epoch has the order of the first one", (SAMPLER,),
        caught_by="test_sampler.py::test_golden_batches_over_the_end_of_an_epoch",
    ),
    Mutant(
        "shares-overlap", "tf_dist/partition.py",
        "start = rank * each + min(rank, more)", "start = rank * each",
        "ranks train on some rows twice, and on others never", (SAMPLER,),
        caught_by="test_sampler.py::test_shares_are_balanced_and_cover_everything_in_order",
    ),
    Mutant(
        "target-beyond-the-end", "tf_dist/data/tokens.py",
        "(at[:, 1:] < len(self.tokens))", "(at[:, 1:] <= len(self.tokens))",
        "the last token is a target twice", ("tests/data/test_tokens.py",),
        caught_by="test_tokens.py::test_every_token_but_the_first_is_a_target_once",
    ),
    # model.fit ------------------------------------------------------------------------------------------
    Mutant(
        "sum-for-mean", f"{FIT}/gradient_reduction.py",
        "np.divide(total_P, self.comm.size, out=buffer_P)", "np.copyto(buffer_P, total_P)",
        "model.fit steps with the sum of all ranks' gradients", (FITS,),
    ),
    Mutant(
        "gathered-gradient-not-scaled", f"{FIT}/gradient_reduction.py",
        "return self.comm.size * upstream[start : start + size]", "return upstream[start : start + size]",
        "a loss over gathered rows has gradients that are R times too small", (OBJECTIVE,),
    ),
    Mutant(
        "blocks-overlap", f"{FIT}/dataset.py",
        "return rank * base + tf.minimum(rank, extra),", "return rank * base,",
        "shard() gives a row to two ranks", ("np 2: tests/mpi/test_fit_mpi.py::test_every_example_once",),
    ),
    Mutant(
        "short-batches-weigh-too-little", f"{FIT}/dataset.py",
        "weight = tf.cast(comm.size * rows, tf.float32)", "weight = tf.cast(rows, tf.float32)",
        "weights of a loop of one's own are R times too small", (FITS,),
    ),
    Mutant(
        "loss-of-own-rows", f"{FIT}/global_losses.py",
        "factor = tf.math.divide_no_nan(tf.cast(scope.size, total.dtype), sums[1])",
        "factor = tf.math.divide_no_nan(tf.cast(1.0, total.dtype), count)",
        "a Keras loss divides by a rank's own rows", (OBJECTIVE,),
    ),
    Mutant(
        "one-mask-for-all", f"{FIT}/rank_randomness.py",
        "if scope is None or not scope.training or scope.rank == 0:",
        "if scope is None or not scope.training or scope.rank >= 0:",
        "all ranks drop out the same units",
        ("np 3: tests/mpi/test_fit_objective_mpi.py::test_dropout_is_another_on_each_rank",),
    ),
    Mutant(
        "compared-too-seldom", f"{FIT}/fit_consistency.py",
        "(step < EVERY_STEPS and step & (step - 1) == 0)", "(step < EVERY_STEPS and step & (step + 1) == 0)",
        "ranks of model.fit are compared after other steps than is said", ("tests/keras_fit/test_laws.py",),
        caught_by="test_laws.py::test_when_the_state_is_compared",
    ),
    Mutant(
        "an-overflow-of-one-rank", f"{FIT}/gradient_reduction.py",
        "np.asarray(sums[NOT_FINITE] == 0)", "np.asarray(sums[NOT_FINITE] < self.comm.size)",
        "ranks step with a gradient that overflowed on one of them", (FITS,),
    ),
)
