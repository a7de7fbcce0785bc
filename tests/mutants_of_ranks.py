"""Faults in what ranks do together: transport, strategies, ZeRO, pipelines and tensor parallelism."""

from mutant import Mutant

COMM, PARALLEL, TRAINING = "tf_dist/comm", "tf_dist/parallel", "tf_dist/training"
STRATEGIES = "tf_dist/strategies"
CONTRACT, NODE = "np 3: tests/mpi/test_comm_contract.py", "np 4: tests/mpi/test_shared_memory_mpi.py"
ZERO, PIPELINE = "np 3: tests/mpi/test_zero_mpi.py", "np 2: tests/mpi/test_pipeline_mpi.py"
TREE, SCHEDULE, COMPRESS = (
    f"tests/parallel/test_{name}.py" for name in ("reduction_tree", "pipeline_schedules", "compress")
)
SYNCHRONOUS, LOCAL_SGD, ASYNCHRONOUS = (
    f"tests/strategies/test_{name}.py" for name in ("synchronous", "local_sgd", "asynchronous")
)

OBJECTIVE, STATES = "np 3: tests/mpi/test_fit_objective_mpi.py", "np 2: tests/mpi/test_fit_states_mpi.py"

# fmt: off
OF_RANKS = (
    # Transport ------------------------------------------------------------------------------------------
    Mutant(
        "additions-backwards", "tf_dist/comm/transport/reduction_order.py",
        "        for i, j in additions:", "        for i, j in reversed(additions):",
        "sums of several ranks are not those of the tree", (TREE,),
        caught_by="test_reduction_tree.py::test_any_ranks_make_the_additions_of_one",
    ),
    Mutant(
        "slice-not-copied", "tf_dist/comm/transport/pipelined_allreduce.py",
        "if total.ctypes.data != target.ctypes.data:", "if total.ctypes.data == target.ctypes.data:",
        "the slice that a rank has added is not the one it sends", (CONTRACT,),
        caught_by="np 3: test_comm_contract.py::test_terms_are_added_in_the_order_of_one_rank",
    ),
    Mutant(
        "window-never-turns", "tf_dist/comm/transport/shared_memory.py",
        "        self._turn = 1 - self._turn", "        self._turn = self._turn",
        "a fast rank writes the terms of the next step over a sum that others still read", (NODE,),
        caught_by="np 4: test_shared_memory_mpi.py::test_the_bits_of_one_rank",
    ),
    Mutant(
        "squares-of-other-blocks", "tf_dist/comm/transport/shared_memory.py",
        "part, at = parts[self._result], first + start // SQUARES_BLOCK",
        "part, at = parts[self._result], start // SQUARES_BLOCK",
        "all ranks of a node write their sums of squares to the first one's place", (NODE,),
        caught_by="np 4: test_shared_memory_mpi.py::test_the_bits_of_one_rank",
    ),
    Mutant(
        "reduced-to-rank-0", "tf_dist/comm/transport/mpi.py",
        "parts = [whole if r == root else nothing for r in range(self.size)]",
        "parts = [whole if r == 0 else nothing for r in range(self.size)]",
        "a reduction goes to rank 0, whoever is its root", (CONTRACT,),
    ),
    Mutant(
        "broadcast-from-0", "tf_dist/comm/transport/mpi.py",
        "self._mpi.Bcast(part, root=root)", "self._mpi.Bcast(part, root=0)",
        "a broadcast comes from rank 0, whoever is its root", (CONTRACT,),
    ),
    Mutant(
        "order-of-two-not-compared", "tf_dist/comm/runtime/collective_order.py",
        "if len(set(everyone)) > 1:", "if len(set(everyone)) > 2:",
        "TF_DIST_DEBUG lets two ranks be in different collectives",
        ("np 3: tests/mpi/test_consistency_check_mpi.py",),
    ),
    Mutant(
        "calls-not-counted", "tf_dist/comm/transport/base.py",
        "        self.calls += 1\n", "        self.calls += 0\n",
        "a collective that one rank leaves out is not found", (CONTRACT,),
    ),
    # Updates --------------------------------------------------------------------------------------------
    Mutant(
        "tree-in-halves", "tf_dist/parallel/reduction_tree.py",
        "middle = node.start + (1 << ((len(node) - 1).bit_length() - 1))",
        "middle = node.start + (len(node) + 1) // 2",
        "ranks add in another order than one rank does", (TREE,),
        caught_by="test_reduction_tree.py::test_any_ranks_make_the_additions_of_one",
    ),
    Mutant(
        "no-clipping", f"{PARALLEL}/totals.py",
        "return clipping(norm, clip_norm) / max(float(counts[TOKENS]), 1.0)",
        "return 1.0 / max(float(counts[TOKENS]), 1.0)",
        "gradients are not clipped", (SYNCHRONOUS,),
        caught_by="test_synchronous.py::test_the_mean_gradient_is_clipped_after_the_sum",
    ),
    Mutant(
        "mean-of-two-terms", f"{PARALLEL}/totals.py",
        "    for term in terms[1:]:", "    for term in terms[2:]:",
        "a rank with several terms loses one of them", (LOCAL_SGD, COMPRESS),
        caught_by="test_local_sgd.py::test_a_meeting_after_every_step_is_synchronous_sgd",
    ),
    Mutant(
        "master-keeps-weights", f"{STRATEGIES}/parameter_server.py",
        "    if mesh.replicas.rank != 0:", "    if mesh.replicas.rank == 0:",
        "ranks do not take over the weights of the master", (SYNCHRONOUS,),
        caught_by="test_synchronous.py::test_tokens_are_what_is_weighed_and_not_ranks",
    ),
    Mutant(
        "outer-momentum-is-not-damped", f"{STRATEGIES}/local_sgd.py",
        "momentum *= np.float32(self.outer_momentum)\n", "momentum *= np.float32(1.0)\n",
        "DiLoCo's outer momentum never fades", (LOCAL_SGD,),
        caught_by="test_local_sgd.py::test_all_that_replicas_do_between_meetings_and_at_them",
    ),
    Mutant(
        "fragments-meet-at-once", f"{STRATEGIES}/local_sgd.py",
        "offset = fragment * self.sync_every // self.outer_fragments", "offset = 0 * fragment",
        "all fragments meet in one step", (LOCAL_SGD,),
        caught_by="test_local_sgd.py::test_each_fragment_meets_once_in_every_stretch",
    ),
    Mutant(
        "steps-lost-under-way", f"{STRATEGIES}/local_sgd.py",
        "weights[one.part] += self._stepped(one, total) - left",
        "weights[one.part] = self._stepped(one, total)",
        "what replicas did while their change travelled is lost", (LOCAL_SGD,),
        caught_by="test_local_sgd.py::test_all_that_replicas_do_between_meetings_and_at_them",
    ),
    Mutant(
        "changes-not-averaged", f"{STRATEGIES}/local_sgd.py",
        "change *= np.float32(one.mine / max(one.all, 1.0))",
        "change *= np.float32(one.mine / max(one.mine, 1.0))",
        "changes of replicas are summed, not averaged by their tokens", (LOCAL_SGD,),
        caught_by="test_local_sgd.py::test_a_meeting_after_every_step_is_synchronous_sgd",
    ),
    Mutant(
        "sent-and-kept", f"{PARALLEL}/compress.py",
        "        self.residual[places] = 0.0\n", "        self.residual[places] *= 1.0\n",
        "top-k sends an element, and sends it again", (COMPRESS,),
        caught_by="test_compress.py::test_what_is_not_sent_stays",
    ),
    Mutant(
        "no-error-feedback", f"{PARALLEL}/compress.py",
        "np.add(gradient, self.residual, out=out)", "np.add(gradient, 0.0 * self.residual, out=out)",
        "what was not sent is lost", (COMPRESS,),
        caught_by="test_compress.py::test_what_is_not_sent_stays",
    ),
    Mutant(
        "centre-runs-away", f"{STRATEGIES}/easgd.py",
        "        self._centre += moved", "        self._centre -= moved",
        "EASGD's centre moves away from its workers", (ASYNCHRONOUS,),
        caught_by="test_asynchronous.py::test_a_worker_and_the_centre_move_towards_each_other",
    ),
    Mutant(
        "gossip-changes-the-mean", f"{STRATEGIES}/gossip.py",
        "weights *= np.float32(share / self.share)", "weights *= np.float32(share)",
        "a rank mixes in too little of what it was sent", (ASYNCHRONOUS,),
        caught_by="test_asynchronous.py::test_gossip_changes_no_mean",
    ),
    Mutant(
        "staler-by-one", "tf_dist/parallel/work_queue.py",
        "unit.step - self.done > self.staleness", "unit.step - self.done > self.staleness + 1",
        "Downpour's workers may be a batch further ahead than was said",
        ("tests/parallel/test_work_queue.py",),
        caught_by="test_work_queue.py::test_every_unit_once_and_nobody_too_far_ahead",
    ),
    # ZeRO -----------------------------------------------------------------------------------------------
    Mutant(
        "shards-not-gathered", f"{STRATEGIES}/zero.py",
        "elif mesh.replicas.size > 1:", "elif mesh.replicas.size > 2:",
        "two ranks never take over each other's shards", (ZERO.replace("np 3", "np 2"),),
    ),
    Mutant(
        "shards-all-from-rank-0", "tf_dist/zero/sharded_replica.py",
        "comm.broadcast(room[start - first : stop - first], owner)",
        "comm.broadcast(room[start - first : stop - first], 0)",
        "weights of another owner's shard are spread by rank 0", (ZERO,),
    ),
    Mutant(
        "decay-inverted", "tf_dist/zero/sharded_optimizer.py",
        "if not decays[one.number]]", "if decays[one.number]]",
        "a sharded optimizer decays biases and spares matrices", ("tests/zero/test_sharded_optimizer.py",),
        caught_by="test_sharded_optimizer.py::test_shards_have_the_bits_of_whole_variables",
    ),
    Mutant(
        "parts-not-restored", "tf_dist/zero/sharded_replica.py",
        "        self.optimizer_step.copy_from_model()  #", "        #",
        "after a resume a shard's ends are those of the first weights", (ZERO,),
    ),
    Mutant(
        "blocks-of-a-run-shifted", "tf_dist/parallel/global_norm.py",
        "skip = start + first * SQUARES_BLOCK - whole", "skip = start",
        "the norm of divided gradients takes other blocks than one rank",
        ("tests/parallel/test_global_norm.py",),
        caught_by="test_global_norm.py::test_what_is_not_finite_stays_so",
    ),
    # Pipelines and tensor parallelism -------------------------------------------------------------------
    Mutant(
        "weights-put-off-too-long", "tf_dist/parallel/pipeline_schedules.py",
        "late = min(rank, limit - ahead)", "late = rank",
        "zero-bubble keeps more micro-batches than it may", (SCHEDULE,),
        caught_by="test_pipeline_schedules.py::test_every_grid_runs_to_its_end",
    ),
    Mutant(
        "tags-meet", "tf_dist/parallel/pipeline_schedules.py",
        "return 2 * self.chunk + (self.kind == B)", "return self.chunk + (self.kind == B)",
        "messages of two boundaries have one tag", (SCHEDULE,),
        caught_by="test_pipeline_schedules.py::test_every_grid_runs_to_its_end",
    ),
    Mutant(
        "tied-gradient-of-one-rank", "tf_dist/pipeline/runner.py",
        "            for rank in ranks[1:]:", "            for rank in ranks[2:]:",
        "a tied table gets the gradient of the first stage alone", (PIPELINE,),
    ),
    Mutant(
        "dropout-by-place", "tf_dist/pipeline/runner.py",
        "self.replica.random_states((self._step, batch.number))",
        "self.replica.random_states((self._step, i))",
        "pipelines beside each other draw one mask", ("np 4: tests/mpi/test_pipeline_mpi.py",),
    ),
    Mutant(
        "losses-count-twice", f"{PARALLEL}/mesh.py",
        " and self.at[TENSOR] == 0", "",
        "each tensor-parallel rank counts the loss", ("np 2: tests/mpi/test_tensor_parallel_mpi.py",),
    ),
    # model.fit ------------------------------------------------------------------------------------------
    Mutant(
        "metrics-of-own-rows", "tf_dist/keras_fit/user_metrics.py",
        "    return own or is_users_code(function) or", "    return own or",
        "a metric function that divides by a count is averaged over ranks", (OBJECTIVE,),
    ),
    Mutant(
        "laws-where-all-is-zero", "tf_dist/keras_fit/objective.py",
        "    moved = True\n", "    moved = False\n",
        "a penalty that vanishes in the dry run is weighed by ranks", (OBJECTIVE,),
    ),
    Mutant(
        "state-of-own-rows", "tf_dist/keras_fit/objective.py",
        "    if taken.other_state:", "    if False and taken.other_state:",
        "a layer that counts rows counts those of its rank", (STATES,),
        caught_by="np 2: test_fit_states_mpi.py::test_a_state_of_each_rank_s_own_rows_is_refused",
    ),
    Mutant(
        "clipping-not-seen", "tf_dist/keras_fit/objective.py",
        "LARGE = 1e6", "LARGE = 2.0",
        "a train_step that clips passes where the first rows are not clipped", (STATES,),
        caught_by="np 2: test_fit_states_mpi.py::test_what_each_rank_would_do_to_its_own_gradients",
    ),
    Mutant(
        "sums-in-logs-averaged", "tf_dist/keras_fit/step_logs.py",
        "part if kind == SUM else", "part if kind == ALIKE else",
        "a count in the logs of a step is a mean of the ranks", (STATES,),
        caught_by="np 2: test_fit_states_mpi.py::test_logs_are_means_or_sums_over_rows",
    ),
    Mutant(
        "generator-read-ahead", "tf_dist/keras_fit/generators.py",
        "* at_once * epochs", "* at_once * epochs * 9",
        "a second fit with a generator begins with another batch on each rank", (STATES,),
        caught_by="np 2: test_fit_states_mpi.py::test_a_generator_is_read_as_far_as_is_trained",
    ),
    Mutant(
        "residual-not-folded", f"{STRATEGIES}/compressed_sum.py",
        "        self._folded = False\n        measured", "        measured",
        "a checkpoint keeps what rank 0 has not sent, and forgets the others",
        ("np 3: tests/mpi/test_compress_mpi.py",),
    ),
)
