"""List of the mutations, by package and file."""

from collections.abc import Iterator

from tests.mutants.mutation import Mutation

ENGINE = "tests/distributed/test_engine_equality.py::test_any_layout_trains_like_one_rank"
LIBRARY = "tests/distributed/test_library.py"
TRAFFIC = "tests/distributed/test_traffic.py"
MIGRATION = "tests/distributed/test_migration.py"
UNIT = "tests/unit"
STATISTICS = f"{UNIT}/recluster/test_coordinator.py {UNIT}/recluster/test_similarity_gather.py"


def _of(file: str, tests: str, *changes: tuple[str, str, str]) -> Iterator[Mutation]:
    """Yield mutations of one file that the same tests should notice: (name, original, replacement)."""
    for name, original, replacement in changes:
        yield Mutation(name, file, original, replacement, tests)


PIPELINE = "tests/distributed/test_pipeline.py"
CHUNKED = "pipeline 2 x data 2 x cluster 1 x shard 1, 2 chunks of layers a stage"
STAGES = f"'{PIPELINE}::test_stages_train_like_one_rank[{CHUNKED}]'"
REGROUPED = f"'{PIPELINE}::test_a_run_with_stages_regroups_and_reports_as_without[adopt-layers0]'"
DIVIDED = f"'{ENGINE}[(1, 2, 1, 1, 2, 1)]' '{ENGINE}[(2, 1, 1, 1, 1, 2)]'"
EIGHT = "tests/distributed/layouts_of_eight.py"
OF_EIGHT = f"{EIGHT}::test_layouts_of_eight_train_like_one_rank"
MUON = "tests/distributed/test_muon.py::test_any_layout_trains_like_one_rank"
MUTATIONS: tuple[Mutation, ...] = (
    # layouts of eight ranks
    *_of(
        "moe/parameter_class.py",
        f"'{OF_EIGHT}[data 2 x cluster 2 x shard 2]'",
        ("gradients of bases over shards are not added", "GroupKind.BASE_DATA", "GroupKind.EXPERT_DATA"),
    ),
    *_of(
        "engine/deepspeed_engine.py",
        f"'{OF_EIGHT}[data 2 x cluster 4 x shard 1, tensor 2 x context 1]'",
        ("gradients of a tensor group count twice", "mesh.shape.tensor\n", "mesh.shape.tensor ** 2\n"),
    ),
    *_of(
        "engine/stage_passes.py",
        f"'{OF_EIGHT}[pipeline 4 x data 1 x cluster 2 x shard 1]'",
        (
            "a last stage's gradient counts three times",
            "(weight, gradient)\n",
            "(weight, 3 * gradient)\n",
        ),
    ),
    *_of(
        "recluster/expert_tensors.py",
        f"'{OF_EIGHT}[data 2 x cluster 4 x shard 1]'",
        (
            "moments stay on the rank of before",
            "kind for kind in PieceKind if",
            "kind for kind in list(PieceKind)[:2] if",
        ),
    ),
    *_of(
        "moe/clustered_experts.py",
        f"'{OF_EIGHT}[data 1 x cluster 4 x shard 2 (slices of the hidden width)]'",
        ("slices have different graphs", 'if self.part.slices > 1 and "output', 'if self.part.number and "output'),
    ),
    # stages whose layers differ
    *_of(
        "conversion/expert_grouping.py",
        "tests/distributed/test_warmup.py::test_any_layout_goes_through_the_change_alike",
        (
            "all stages take the first one's clusters",
            "src=mesh.stage * mesh.shape.stage_ranks, group=mesh.stage_group",
            "src=0",
        ),
    ),
    *_of(
        "model/megatron_backbone.py",
        f"'{PIPELINE}::test_stages_train_like_one_rank[pipeline 4 x data 1 x cluster 1 x shard 1]'",
        (
            "windows begin anew in each stage",
            "for number in numbers]",
            "for number, _ in enumerate(numbers)]",
        ),
    ),
    # muon
    *_of(
        "engine/muon.py",
        f"'{MUON}[(2, 1, 1)]' '{MUON}[(2, 2, 1)]'",
        ("sum of gradients, not their mean", "            gradient.div_(self._mesh.shape.stage_ranks)\n", ""),
        ("owners keep new weights", "        if self.divided:\n            self._broadcast()\n", ""),
        (
            "gradients of replicas are not added",
            "work = dist.reduce(gradient, self._owners[parameter], group=group, async_op=True)",
            "pass",
        ),
        (
            "each replica's copy of a matrix counts in the norm",
            "copies = 1 if self.divided else len(self._ranks[parameter])",
            "copies = 1",
        ),
    ),
    # attention divided over ranks
    *_of(
        "engine/deepspeed_engine.py",
        DIVIDED,
        (
            "loss of a tensor group counts once",
            "_missing_scale * self.model.context.mesh.shape.tensor",
            "_missing_scale",
        ),
    ),
    *_of(
        "moe/parameter_class.py",
        DIVIDED,
        (
            "different shards are added",
            "ParameterClass.TENSOR: GroupKind.TENSOR_DATA",
            "ParameterClass.TENSOR: GroupKind.TENSOR",
        ),
    ),
    *_of(
        "dispatch/advantage_gate.py",
        DIVIDED,
        ("advantage over a part of the sequence", "    if group is not None:\n", "    if False:\n"),
    ),
    *_of(
        "model/megatron_attention.py",
        DIVIDED,
        ("each part of a sequence starts at 0", "offset + self._part * max_seq_len", "offset"),
        ("gradients of heads are not exchanged", "return _exchange(grad_C, ctx.group), None", "return grad_C, None"),
    ),
    *_of(
        "model/language_model.py",
        DIVIDED,
        ("every rank takes the first part", "dim=1)[mesh.in_attention.context]", "dim=1)[0]"),
    ),
    *_of(
        "checkpoint/parameter_names.py",
        "tests/distributed/test_resume.py::test_other_numbers_of_ranks_go_on_with_the_same_losses",
        ("shards saved at the tensor's start", "row * whole + own * part, part", "row * whole, part"),
    ),
    # pipeline stages
    *_of(
        "engine/stage_passes.py",
        STAGES,
        ("no gradient from the output layer to a tied embedding", "                backward(weight, gradient)\n", ""),
        ("it counts twice", "backward(weight, gradient)\n", "backward(weight, 2 * gradient)\n"),
        ("dense gradients over all ranks", "return self._stage.handle", "return None"),
        ("gradients reduced before the last pass", "(self._left == 0)", "(self._left <= 1)"),
        ("the step's loss is that of the last micro-batch", "torch.stack(losses).sum()", "losses[-1]"),
    ),
    *_of(
        "model/pipeline_stage.py",
        STAGES,
        (
            "chunks of a stage are neighbors",
            "(chunk * stages + mesh.stage) * size",
            "(mesh.stage * chunks + chunk) * size",
        ),
    ),
    *_of(
        "model/initial_values.py",
        f"{UNIT}/model/test_initial_values.py",
        ("all matrices start alike", "generator(seed, 0, name, 0)", "generator(seed, 0, 'matrix', 0)"),
    ),
    *_of(
        "distributed/mesh.py",
        f"{PIPELINE}::test_groups_of_eight_ranks_by_hand",
        (
            "stages hold every second rank",
            "GroupKind.STAGE] = [(rank // per_stage,)",
            "GroupKind.STAGE] = [(rank % shape.pipeline,)",
        ),
    ),
    *_of(
        "training/validation.py",
        REGROUPED,
        ("targets count in each stage", " * model.stage.last", ""),
    ),
    *_of(
        "recluster/similarity_gather.py",
        REGROUPED,
        (
            "statistics over layers of other stages",
            "dist.all_reduce(tensor, group=context.mesh.stage_group)",
            "dist.all_reduce(tensor)",
        ),
    ),
    *_of(
        "recluster/migration_plan.py",
        REGROUPED,
        ("experts are sent to the first stage", "at.shard), holdings.stage)", "at.shard), 0)"),
    ),
    # moe
    *_of(
        "moe/capacity.py",
        f"{UNIT}/moe/test_capacity.py",
        ("capacity rounded down", "max(1, ceil(factor * copies / bins))", "max(1, int(factor * copies / bins))"),
        ("one copy more than the capacity kept", "place_C < capacity", "place_C <= capacity"),
        ("places counted from the end of the bin before", "count_B.cumsum(0) - count_B", "count_B.cumsum(0)"),
        (
            "last copies kept",
            "order_C = index_C.argsort(stable=True)",
            "order_C = index_C.argsort(stable=True).flip(0)",
        ),
    ),
    *_of(
        "moe/load_balancing.py",
        f"{UNIT}/moe/test_balance.py",
        (
            "each expert counted once",
            "scatter_add_(0, expert_C, torch.ones_like(expert_C))",
            "scatter_(0, expert_C, torch.ones_like(expert_C))",
        ),
        ("kept copies counted as dropped", "copies * (~keep_C).sum()", "copies * keep_C.sum()"),
        ("a dropped row counts as one copy", "copies * (~keep_C).sum()", "(~keep_C).sum()"),
        ("router losses never reset", "        self.router_loss_2.zero_()\n", ""),
        ("auxiliary loss without its weight", "index_RK), self._weight)", "index_RK), 1.0)"),
        ("biases pushed towards the load", "self._rate = moe.balance_rate", "self._rate = -moe.balance_rate"),
        ("restored biases replaced by their sum", "bias.copy_(state[name])", "bias.add_(state[name])"),
    ),
    *_of(
        "moe/selection_bias.py",
        f"{UNIT}/moe/test_balance.py",
        (
            "wrong sign of standard biases",
            "count_LE.mean(dim=-1, keepdim=True) - count_LE)",
            "count_LE - count_LE.mean(dim=-1, keepdim=True))",
        ),
        (
            "wrong sign of cluster biases",
            "count_LG.mean(dim=-1, keepdim=True) - count_LG)",
            "count_LG - count_LG.mean(dim=-1, keepdim=True))",
        ),
        (
            "expert against the mean of all experts",
            "count_LGN.mean(dim=-1, keepdim=True)",
            "count_LGN.mean(dim=(1, 2), keepdim=True)",
        ),
        (
            "biases written by slot",
            "expert_bias_LE.scatter_add_(1, member_LE, step_LGN.flatten(1))",
            "expert_bias_LE += step_LGN.flatten(1)",
        ),
    ),
    *_of(
        "moe/routing_statistics.py",
        f"{STATISTICS} {UNIT}/moe/test_clustered_moe.py",
        ("pairs never fade", "            self.together_LGG *= self.decay\n", ""),
        ("statistics never fade", "                statistics.begin_step()\n", "                pass\n"),
        ("pairs of two clusters not counted", "cluster_TM.shape[1] > 1", "cluster_TM.shape[1] > 2"),
        ("router weights of zero", "gate_RK.detach(), member_N", "gate_RK.detach() * 0, member_N"),
    ),
    *_of(
        "moe/router_losses.py",
        f"{UNIT}/moe/test_losses.py",
        ("balance loss without the number of choices", "logits_RE.shape[1] * (share_E", "(share_E"),
        ("mean of the z-loss", ".square().sum()", ".square().mean()"),
        (
            "probability of the last row alone",
            "logits_RE.softmax(dim=-1).sum(dim=0)",
            "logits_RE.softmax(dim=-1)[-1:].sum(dim=0)",
        ),
    ),
    *_of(
        "moe/attached_loss.py",
        f"{UNIT}/moe/test_clustered_moe.py {UNIT}/moe/test_losses.py",
        ("attached loss without its scale", "torch.tensor(ctx.scale,", "torch.tensor(1.0,"),
        ("loss reported without its weight", "+= weight * loss.detach()", "+= loss.detach()"),
        ("losses entered under each other's name", "balance.router_loss_2[entry]", "balance.router_loss_2[1 - entry]"),
        ("losses attached during evaluation", "    if not torch.is_grad_enabled():\n        return x\n", ""),
    ),
    *_of(
        "moe/two_stage_routing.py",
        f"{UNIT}/moe/test_two_stage.py",
        ("prototype is the mean", "/ math.sqrt(member_GN.shape[1])", "/ member_GN.shape[1]"),
        ("cluster bias subtracted", "(logits_TG.detach() + bias_G).argmax", "(logits_TG.detach() - bias_G).argmax"),
        (
            "expert bias enters the gate",
            "chosen_RK = logits_RN.gather(-1, slot_RK)",
            "chosen_RK = (logits_RN + bias_N).gather(-1, slot_RK)",
        ),
        ("mass of all experts", "chosen_RK.logsumexp(dim=-1)", "logits_RN.logsumexp(dim=-1)"),
        (
            "gate is the probability",
            "(log_probability_T1 - log_probability_T1.detach()).exp()",
            "log_probability_T1.exp()",
        ),
    ),
    *_of(
        "moe/stage_two.py",
        f"{UNIT}/moe/test_clustered_moe.py",
        (
            "biases of the first experts",
            "expert_bias_LE[self.layer][member_N]",
            "expert_bias_LE[self.layer][: len(member_N)]",
        ),
        (
            "loads counted by slot",
            "balance.count(self.layer, member_N[choice.slot_RK.flatten()])",
            "balance.count(self.layer, choice.slot_RK.flatten())",
        ),
        (
            "capacity without the number of clusters",
            "self.ranks * moe.top_clusters * moe.top_k",
            "self.ranks * moe.top_k",
        ),
        ("losses not divided by tokens", "scale = self.loss_scale / max(1, self.tokens)", "scale = self.loss_scale"),
    ),
    *_of(
        "moe/clustered_moe.py",
        f"{UNIT}/moe/test_clustered_moe.py",
        ("output divided by its scale", "y_TD = y_TD * self.moe.gate_scale", "y_TD = y_TD / self.moe.gate_scale"),
        (
            "a row dropped before its cluster counts once",
            "self.balance.drop(self.layer, keep_C, self.moe.top_k)",
            "self.balance.drop(self.layer, keep_C)",
        ),
        ("biases of the first layer", "self.balance.cluster_bias_LG[self.layer]", "self.balance.cluster_bias_LG[0]"),
        ("statistics collected in evaluations", " is not None and self.balance.counting:", " is not None:"),
    ),
    *_of(
        "moe/topk_routing.py",
        f"{UNIT}/moe/test_standard_routing.py",
        (
            "bias enters the gates",
            "scoring.log_gates(logits_TE).gather(-1, expert_TK).softmax(dim=-1)",
            "scoring.log_gates(logits_TE + bias_E).gather(-1, expert_TK).softmax(dim=-1)",
        ),
        (
            "gates over all experts",
            "scoring.log_gates(logits_TE).gather(-1, expert_TK).softmax(dim=-1)",
            "logits_TE.softmax(dim=-1).gather(-1, expert_TK)",
        ),
    ),
    *_of(
        "moe/training_step.py",
        f"{UNIT}/moe/test_training_step.py {LIBRARY}::test_any_mesh_trains_like_one_rank",
        (
            "bases reduced over the replicas of experts",
            "ParameterClass.BASE: (GroupKind.BASE_DATA,)",
            "ParameterClass.BASE: (GroupKind.EXPERT_DATA,)",
        ),
        ("gradients not divided by ranks", "        parameter.grad /= mesh.shape.ranks\n", ""),
        (
            "loads of a rank alone",
            "            _sum_over(tensor, context.mesh, OVER_ALL_RANKS)\n",
            "            pass\n",
        ),
    ),
    *_of(
        "moe/parameter_class.py",
        f"'{ENGINE}[(1, 1, 2)]'",
        (
            "bases and experts reduced over each other's ranks",
            "ParameterClass.BASE: GroupKind.BASE_DATA,\n    ParameterClass.EXPERT: GroupKind.EXPERT_DATA",
            "ParameterClass.BASE: GroupKind.EXPERT_DATA,\n    ParameterClass.EXPERT: GroupKind.BASE_DATA",
        ),
    ),
    # dispatch
    *_of(
        "dispatch/permute.py",
        f"{UNIT}/dispatch/test_permute.py",
        ("gradient permuted forward", "ctx.save_for_backward(inverse_R)", "ctx.save_for_backward(order_R)"),
        (
            "inverse is the order itself",
            "return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.num"
            "el(), device=order_R.device))",
            "return order_R.clone()",
        ),
        ("groups repeated for each source in a block", ".repeat(sources)", ".repeat_interleave(sources)"),
    ),
    *_of(
        "dispatch/traffic_ledger.py",
        f"{UNIT}/dispatch/test_ledger.py",
        ("rows to itself counted", "if size and peer != self.links.rank:", "if size:"),
        ("empty messages counted", "if size and peer != self.links.rank:", "if peer != self.links.rank:"),
        ("messages counted by bytes", "volume.messages += 1", "volume.messages += size"),
        (
            "carried traffic of another link counted",
            "if all(one is None or one is found for one, found in zip(asked, kinds, strict=True)):",
            "if True:",
        ),
        ("counts while not recording", "        if not self.recording:\n            return\n", ""),
        (
            "traffic before a resume kept twice",
            "        self.clear()\n        self.carried = state",
            "        self.carried = self.carried + state",
        ),
    ),
    *_of(
        "dispatch/traffic_model.py",
        f"{UNIT}/dispatch/test_traffic_model.py",
        ("vectors sent there only", "4 * self.hidden + self.there", "2 * self.hidden + self.there"),
        ("no gradient of the log-mass", "self.there_gradient + 2 * self.back", "self.there_gradient + self.back"),
        ("no scale with 8 bits", '(FLOAT32 if wire_dtype == "int8" else 0)', "0"),
        (
            "rows that stay on their rank counted",
            "there = rows_PP - rows_PP * np.eye(rows_PP.shape[-1])",
            "there = rows_PP",
        ),
        (
            "gradients sent the other way round",
            "self.there_gradient * back + self.back * there",
            "self.there_gradient * there + self.back * back",
        ),
        ("counts of one cluster a rank", "INT64 * (moe.clusters // shape.cluster)  # each", "INT64  # each"),
    ),
    *_of(
        "dispatch/layout_advice.py",
        f"{UNIT}/dispatch/test_layout_advice.py",
        ("flat routing leaves every rank", "moe.top_k * (1 - 1 / ranks)", "moe.top_k"),
        ("probability of none", "return 1 - comb(total - held, chosen)", "return comb(total - held, chosen)"),
        (
            "one copy for all chosen clusters",
            "return moe.top_clusters * shape.shard * others * _needed",
            "return shape.shard * others * _needed",
        ),
        ("worst layout advised", "better = min(", "better = max("),
    ),
    *_of(
        "dispatch/wire_format.py",
        f"{UNIT}/dispatch/test_wire.py",
        (
            "one scale for all rows",
            "wide_RD.abs().amax(dim=1, keepdim=True)",
            "wide_RD.abs().amax().expand(len(wide_RD), 1)",
        ),
        ("codes cut instead of rounded", ".nan_to_num(0).round()", ".nan_to_num(0)"),
        ("infinite scale sent", "torch.where(scale_R1.isinf(), torch.nan, scale_R1)", "scale_R1"),
    ),
    *_of(
        "dispatch/advantage_gate.py",
        f"{UNIT}/dispatch/test_advantage_gate.py",
        ("gradient without its baseline", "return grad_T - (sums / numbers.clamp(min=1))[group_T]", "return grad_T"),
        ("baseline over all sequences", "group_T = sequence_T * clusters + cluster_T", "group_T = cluster_T"),
        (
            "wrong sign of the gate's gradient",
            "(chosen_TG - probability_TG), None",
            "(probability_TG - chosen_TG), None",
        ),
        ("tokens of a sequence are neighbors", "% sequences\n", "// max(1, len(grad_T) // sequences) % sequences\n"),
    ),
    *_of(
        "dispatch/chunked_overlap.py",
        f"{UNIT}/dispatch/test_overlap.py",
        (
            "remainders left out",
            '(count_P * end_C).div(chunks, rounding_mode="floor")',
            "((count_P // chunks) * end_C)",
        ),
        ("slowest number of chunks", "best = min(candidates", "best = max(candidates"),
        ("overlap of all exchanges", "total += in_turn - speed.hidden * (in_turn - at_once)", "total += at_once"),
        ("chunks chosen for any gain", "<= (1 - LEAST_GAIN) *", "<="),
        ("backward pass as cheap as forward", "BACKWARD_WORK = 2", "BACKWARD_WORK = 1"),
    ),
    *_of(
        "dispatch/routing_trace.py",
        f"{UNIT}/dispatch/test_observed.py",
        ("absent choices counted", "on_P & (choice_RK >= 0)[:, :, None]", "on_P"),
        ("own node counted", "- {self.node_of_rank[self.rank]})", ")"),
        ("more choices kept than asked", "choice_RK[:left]", "choice_RK"),
    ),
    *_of(
        "dispatch/flat_dispatcher.py",
        f"{UNIT}/dispatch/test_alone.py",
        ("results returned in the order of sending", "y_CD = permuted(y_SD, inverse(copy_S), copy_S)", "y_CD = y_SD"),
        ("results summed without gates", "gate_TK.to(y_CD.dtype))", "torch.ones_like(gate_TK).to(y_CD.dtype))"),
        ("dropped copies computed", "copy_S = copy_S[keep_C[copy_S]]", "copy_S = copy_S[keep_C | True]"),
    ),
    *_of(
        "dispatch/top1_dispatcher.py",
        f"{UNIT}/moe/test_clustered_moe.py",
        ("results in the order of sending", "permuted(joined(y_C), metadata.back_T, metadata.order_T)", "joined(y_C)"),
        (
            "kept tokens in the first rows",
            "index_copy(0, metadata.kept_K, y_TD)",
            "index_copy(0, torch.arange(len(y_TD)), y_TD)",
        ),
    ),
    *_of(
        "dispatch/topm_dispatcher.py",
        f"{UNIT}/moe/test_clustered_moe.py",
        ("mass of experts replaces the cluster's logit", "output.log_mass_R, accumulate=True", "output.log_mass_R"),
        (
            "clusters weighted alike",
            "weight_RL = mass_RL.softmax(dim=1)",
            "weight_RL = mass_RL.isfinite() / mass_RL.isfinite().sum(1, keepdim=True)",
        ),
    ),
    *_of(
        "dispatch/all_to_all.py",
        f"{TRAFFIC}::test_every_byte_and_message_is_counted",
        (
            "counts not recorded",
            "        self._record(Payload.COUNTS, Direction.FORWARD, [size] * self.group.size)\n",
            "",
        ),
        (
            "gradients recorded as forward",
            "ctx.exchange.start(grad_RD, Direction.BACKWARD)",
            "ctx.exchange.start(grad_RD, Direction.FORWARD)",
        ),
    ),
    *_of(
        "dispatch/shard_dispatcher.py",
        f"'{ENGINE}[(1, 1, 2)]'",
        ("gates of other shards' experts kept", "gate_RK[row_A] * here_AK", "gate_RK[row_A]"),
        ("slots counted within the cluster", "slot_RK[row_A] % per_shard", "slot_RK[row_A]"),
    ),
    # recluster
    *_of(
        "recluster/decision.py",
        f"{UNIT}/recluster/test_decision.py",
        ("threshold halved", "> limits.threshold:", "> limits.threshold / 2:"),
        ("worst exchange first", "key=lambda cycle: -gain(cycle, start)", "key=lambda cycle: gain(cycle, start)"),
        ("gain of a cycle instead of a mover", "* experts / (2 * len(cycle))", "* experts / 2"),
        ("limit of movers applies to each exchange alone", "            room -= len(cycle)\n", ""),
        ("later exchanges judged by the first labels", "gain(cycle, labels_E) > limits", "gain(cycle, start) > limits"),
        ("experts move backward", "labels[[*cycle[1:], cycle[0]]]", "labels[[cycle[-1], *cycle[:-1]]]"),
        (
            "loads do not weigh",
            "pair_weights(similarity_EE, placement.clusters, load_E, weight)",
            "pair_weights(similarity_EE, placement.clusters)",
        ),
        ("relocation for any gain", "LEAST_SAVING = 0.02", "LEAST_SAVING = 0.0"),
        ("relocation for twice the gain", "LEAST_SAVING = 0.02", "LEAST_SAVING = 0.05"),
        ("a cluster with itself counts as a pair", "    np.fill_diagonal(together, 0.0)\n", ""),
    ),
    *_of(
        "recluster/guard.py",
        f"{UNIT}/recluster/test_guard_and_schedule.py",
        ("limit absolute", "loss() / base - 1", "loss() - base"),
        ("a move at the limit rejected", "<= limit:", "< limit:"),
        ("second half never tried", "            consider(some[len(some) // 2 :])\n", ""),
        ("halves tried without those accepted", "if harm([*accepted, *some]) <= limit", "if harm(some) <= limit"),
        ("trial not reverted", "        transition.revert()\n", ""),
        ("all moves made", "transition.commit(made)", "transition.commit(list(moves))"),
    ),
    *_of(
        "recluster/schedule.py",
        f"{UNIT}/recluster/test_guard_and_schedule.py",
        ("intervals never grow", "        interval *= recluster.growth\n", ""),
        ("stop ignored", "min(step, recluster.stop or step)", "step"),
        ("last round is the first", "return max(_rounds_until", "return min(_rounds_until"),
    ),
    *_of(
        "recluster/exchange.py",
        f"{UNIT}/recluster/test_exchange.py",
        (
            "experts take the slot of the one before",
            "successor[slot_holder] = expert",
            "successor[expert] = slot_holder",
        ),
        ("version of the placement kept", "members=members, version=placement.version + 1", "members=members"),
    ),
    *_of(
        "recluster/coordinator.py",
        f"{UNIT}/recluster/test_coordinator.py",
        (
            "moves tried on the batch just trained on",
            "held_BS = report.upcoming()[:",
            "held_BS = report.sequences_BS[:",
        ),
        (
            "refit tried on the batch just trained on",
            "self.executor.refit(moves, sequences_BS, held_BS)",
            "self.executor.refit(moves, sequences_BS, sequences_BS)",
        ),
        (
            "loads never reach the decision",
            "decide_layer(similarity_EE, placement, load_E, *settings)",
            "decide_layer(similarity_EE, placement, np.ones_like(load_E), *settings)",
        ),
        ("loads never recorded", "* self._load_LE + outcome.count_LE.numpy()", "* self._load_LE"),
        ("load average forgets at once", "self._config.recluster.decay * self._load_LE + outcome", "outcome"),
        (
            "statistics collected in the first step only",
            "collecting = step <= self._last_round",
            "collecting = step == 1",
        ),
        ("statistics collected for ever", "collecting = step <= self._last_round", "collecting = True"),
        ("statistics never begin a step", "            self._context.statistics.begin_step()\n", ""),
        ("last loss instead of the mean", "float(np.mean(self._losses)),", "self._losses[-1],"),
        ("bytes of relocations left out", '"bytes": relocated + exchanged', '"bytes": exchanged'),
        ("relocation not asked for", "if not self._config.recluster.relocate:", "if True:"),
        (
            "round after the last one that counts",
            "last_round(config.train.steps - 1, config.recluster)",
            "last_round(config.train.steps, config.recluster)",
        ),
    ),
    *_of(
        "recluster/similarity_gather.py",
        f"{UNIT}/recluster/test_similarity_gather.py",
        (
            "router similarity is the identity",
            "router_similarity(layer.router.weight_ED.detach().float())",
            "torch.eye(len(layer.router.weight_ED), dtype=torch.float64)",
        ),
        ("pairs of this rank alone", "    dist.all_reduce(together)\n", ""),
        (
            "statistics summed in place",
            "mine.weighted_ED.clone(), mine.mass_E.clone()",
            "mine.weighted_ED, mine.mass_E",
        ),
        ("statistics not reset", "            statistics.reset()\n", "            pass\n"),
        (
            "router weight ignored",
            "router, alpha=recluster.alpha, router_weight=recluster.router_weight",
            "router, alpha=recluster.alpha, router_weight=0.0 if centroid is not None else 1.0",
        ),
    ),
    *_of(
        "recluster/migration_plan.py",
        f"{UNIT}/recluster/test_plan.py",
        ("own copies counted as sent", "for a, b in self.by_pair if a != b)", "for a, b in self.by_pair)"),
        ("expert read from slot 0", "seat.slot * width, target", "0, target"),
        ("bases never move", "        if places[0] != places[1]:\n", "        if False:\n"),
        ("elements counted instead of bytes", "piece.length * self.itemsize[piece.source.kind]", "piece.length"),
    ),
    *_of(
        "recluster/transfer.py",
        f"{UNIT}/recluster/test_checksum.py",
        ("checksum blind to order", "(2 * place + 1)).sum()", "1).sum()"),
        ("chunks weighted alike", " + number * CHECKSUM_CHUNK", ""),
        ("length left out", "torch.tensor(len(body), device", "torch.tensor(0, device"),
    ),
    *_of(
        "recluster/migration_executor.py",
        f"{UNIT}/recluster/test_migration_executor.py "
        f"'{MIGRATION}::test_where_clusters_live_changes_no_bit_of_what_follows[(1, 2, 1)]'",
        ("relocated clusters not routed to", "                self._switch(new)\n", ""),
        (
            "clusters relocated backward",
            "blocks[cluster] = placement.block_of_cluster[following]",
            "blocks[following] = placement.block_of_cluster[cluster]",
        ),
    ),
    *_of(
        "recluster/migration_executor.py",
        f"{MIGRATION}::test_moves_that_would_harm_leave_no_trace",
        ("weights stay on trial", "        self.replaced.settle()\n", ""),
    ),
    # memory
    *_of(
        "memory/eviction.py",
        f"{UNIT}/memory/test_expert_memory.py {UNIT}/memory/test_tiers.py",
        ("newest block first", "-use.last if newest_first else use.last", "use.last if newest_first else -use.last"),
        ("hot clusters first", "not use.idle, not cold,", "not use.idle, cold,"),
        ("idle blocks last", "use.prefetched, not use.idle,", "use.prefetched, use.idle,"),
        ("prefetched blocks first", "return use.prefetched,", "return not use.prefetched,"),
        ("rows not averaged", "DECAY * self._rows[layer][local] + (1 - DECAY) * rows", "rows"),
        ("cold against the sum", "rows[local] * len(rows) < COLD", "rows[local] < COLD"),
    ),
    *_of(
        "memory/arena.py",
        f"{UNIT}/memory/test_tiers.py",
        ("peak is the last use", "self.peak = max(self.peak, self.in_use)", "self.peak = self.in_use"),
        ("freed buffers still counted", "            self.account.free(largest)\n", ""),
        ("budget exceeded by a block", "if size > self.room:", "if size > self.room + size:"),
        ("idle buffers count as used", "self.account.room + self._idle >= size", "self.account.room >= size"),
    ),
    *_of(
        "memory/block.py",
        f"{UNIT}/memory/test_tiers.py",
        ("parameters not aligned", "start += -(-shape.numel() // ALIGN) * ALIGN", "start += shape.numel()"),
        ("size in elements", "self.elements * self.dtype.itemsize", "self.elements"),
        ("runs end before their last parameter", "starts[indices[-1] + 1]", "starts[indices[-1]]"),
    ),
    *_of(
        "memory/block_cache.py",
        f"{UNIT}/memory/test_tiers.py {UNIT}/memory/test_late_fetches.py",
        ("changes forgotten at the next use", "resident.changed |= changed", "resident.changed = changed"),
        ("changed blocks not written", "        if resident.changed:\n", "        if False:\n"),
        ("all blocks written", "        if resident.changed:\n", "        if True:\n"),
        ("pinned blocks evicted", "if not entry.pins and not entry.busy]", "if not entry.busy]"),
        (
            "dropped blocks kept below",
            "        self._below.discard(block)\n\n    discard = drop",
            "\n    discard = drop",
        ),
        ("late prefetches not cancelled", "if self._generations[block] != generation:", "if False:"),
        ("prefetches evict prefetched blocks", "if demanded or not pair[1].prefetched]", "if True]"),
        ("stale values below new zeros", "                self._below.discard(block)\n", ""),
    ),
    *_of(
        "memory/disk_tier.py",
        f"{UNIT}/memory/test_tiers.py",
        ("checksum not compared", "if _checksum(values) != self._digests[block]:", "if False:"),
        ("blocks overlap in their file", "-(-size.bytes // PAGE) * PAGE", "size.bytes // PAGE * PAGE"),
        ("reads resume at the block's start", "offset + done)\n            except", "offset)\n            except"),
        ("writes resume at the block's start", "data[done:], offset + done)", "data[done:], offset)"),
    ),
    *_of(
        "memory/expert_memory.py",
        f"{UNIT}/memory/test_expert_memory.py",
        (
            "activity never noted",
            "            self.activity.note(cluster.layer, cluster.local, rows)\n",
            "            pass\n",
        ),
        (
            "rows counted in evaluations",
            "if torch.is_grad_enabled() and not self.recomputing:",
            "if not self.recomputing:",
        ),
        (
            "prefetch backward in the forward pass",
            "in self.next_clusters(cluster, 1) if",
            "in self.next_clusters(cluster, -1) if",
        ),
        (
            "prefetch forward in the backward pass",
            "in self.next_clusters(cluster, -1):",
            "in self.next_clusters(cluster, 1):",
        ),
        (
            "prefetch in reverse order",
            "return [other for other in found if other is not None]",
            "return [other for other in found if other is not None][::-1]",
        ),
        ("one cluster less prefetched", "(self._options.prefetch + 1)", "self._options.prefetch"),
        ("gradient of every micro-batch finished", "if self.last_pass and self.on_gradient", "if self.on_gradient"),
        (
            "runs read from the block's start",
            "first = cluster.layout.spans[name].start + start\n            return",
            "first = 0\n            return",
        ),
    ),
    *_of(
        "memory/offloaded_cluster.py",
        f"{UNIT}/memory/test_expert_memory.py",
        (
            "gradient of the last micro-batch alone",
            "self._gradient[parameter].add_(parameter.grad)",
            "self._gradient[parameter].copy_(parameter.grad)",
        ),
        ("gradient counted twice", "        parameter.grad = None\n", ""),
        ("passes without rows not counted", "        self._schedule.forward_begins(self, 0)\n", ""),
    ),
    # metrics
    *_of(
        "metrics/load_balance.py",
        f"{UNIT}/metrics/test_load_balance.py",
        ("cv2 with one factor E", "variance * experts**2", "variance * experts"),
        (
            "largest over the sum",
            "float(shares_LE.max(axis=1).mean()) * experts",
            "float(shares_LE.max(axis=1).mean())",
        ),
        ("entropy in nats", "/ np.log(experts)\n", "\n"),
        ("idle layers counted", "counts_LE = counts_LE[counts_LE.sum(axis=1) > 0]", "counts_LE = counts_LE[:]"),
        ("shares of all layers", "counts_LE.sum(axis=1, keepdims=True)", "counts_LE.sum(keepdims=True)"),
        ("variance of a sample", "shares_LE.var(axis=1).mean()", "shares_LE.var(axis=1, ddof=1).mean()"),
    ),
    *_of(
        "metrics/spread.py",
        f"{UNIT}/metrics/test_spread.py",
        ("ratios upside down", "[a / b for a, b", "[b / a for a, b"),
        ("quartiles outside of the data", 'method="inclusive"', 'method="exclusive"'),
        ("mean instead of the median", "statistics.median(values)", "statistics.mean(values)"),
    ),
    *_of(
        "metrics/run_folder.py",
        f"{UNIT}/metrics/test_run_folder.py",
        ("line of the resumed step removed", 'record["step"] > step', 'record["step"] >= step'),
        ("events cut back", 'None if file.name == "events.jsonl" else step', "step"),
        ("summary of an earlier end kept", '            (path / "summary.json").unlink(missing_ok=True)\n', ""),
    ),
    *_of(
        "metrics/json_text.py",
        f"{UNIT}/metrics/test_run_folder.py",
        ("infinity written as it is", "not math.isfinite(value)", "math.isnan(value)"),
    ),
    *_of(
        "metrics/summary_rows.py",
        f"{UNIT}/metrics/test_display.py",
        ("share of experts upside down", "{own / standard:.1%}", "{standard / own:.1%}"),
    ),
    *_of(
        "metrics/summary_table.py",
        f"{UNIT}/metrics/test_display.py",
        (
            "the curve's last point left out",
            "round(i * (len(points) - 1) / (most - 1))",
            "round(i * (len(points) - 1) / most)",
        ),
    ),
    *_of(
        "training/summary_metrics.py",
        f"{UNIT}/training/test_summary_metrics.py",
        (
            "bytes per token and layer halved",
            '"bytes_per_token_layer": total(0) / token_layers,\n        "hid',
            '"bytes_per_token_layer": total(0) / token_layers / 2,\n        "hid',
        ),
        ("traffic of this rank alone", "    dist.all_reduce(sent)\n", ""),
        ("layers left out", "max(1, tokens * moe_layers)", "max(1, tokens)"),
        (
            "all bytes between nodes",
            '"bytes_inter_node": total(0, LinkKind.INTER_NODE)',
            '"bytes_inter_node": total(0)',
        ),
        ("matrix transposed", "torch.stack(rows, dim=2)", "torch.stack(rows, dim=3)"),
        ("largest for smallest", '"rss_bytes_min": -smallest', '"rss_bytes_min": largest'),
    ),
    *_of(
        "config/layer_kinds.py",
        f"{UNIT}/config/test_layer_kinds.py",
        (
            "standard experts doubled",
            "return moe.experts * PROJECTIONS * d * moe.expert_hidden",
            "return 2 * moe.experts * PROJECTIONS * d * moe.expert_hidden",
        ),
    ),
    *_of(
        "training/load_metrics.py",
        f"{UNIT}/training/test_loads.py",
        ("first fifth of the steps", "steps[-max(1, len(steps) // 5) :]", "steps[: max(1, len(steps) // 5)]"),
        ("counts of the last step alone", "self._since.get(level, 0) + counts_LH", "counts_LH"),
        ("dropped copies not divided", "dropped / self._copies", "dropped"),
    ),
    # checkpoint
    *_of(
        "checkpoint/store.py",
        f"{UNIT}/checkpoint/test_store.py {UNIT}/checkpoint/test_trust.py",
        ("one checkpoint less kept", "complete[options.keep_last :]", "complete[options.keep_last - 1 :]"),
        ("every nth pruned", "if not kept or step_of(path) % kept]", "if not kept or not step_of(path) % kept]"),
        ("checksum not compared", 'hashlib.file_digest(file, "sha256").hexdigest() != record.sha256', "False"),
        ("oldest first", "key=step_of, reverse=True)", "key=step_of)"),
        ("incomplete checkpoints count", "if _is_complete(path)]", "]"),
        ("every rank reads all", "number % parts == part and ", ""),
        (
            "incomplete tensors accepted",
            "if sum(length for _, length, _ in tensor.chunks) != tensor.numel:",
            "if False:",
        ),
    ),
    *_of(
        "checkpoint/stateful.py",
        f"{UNIT}/checkpoint/test_stateful.py",
        (
            "sums divided among ranks from row 0",
            "range(rank, tensor.shape[0], ranks)",
            "range(0, tensor.shape[0], ranks)",
        ),
        ("own values on other numbers of ranks", "elif tensor.shape[0] == ranks:", "else:"),
        ("the last row instead of the sum", "        total += shard", "        total = shard"),
        ("another rank's row", "_rows(tensor, range(rank, rank + 1))", "_rows(tensor, range(0, 1))"),
    ),
    *_of(
        "checkpoint/find.py",
        f"{UNIT}/checkpoint/test_store.py",
        ("oldest valid checkpoint", "sorted(found, reverse=True)", "sorted(found)"),
        ("final weights for training", "if weights and is_checkpoint(final):", "if is_checkpoint(final):"),
    ),
    *_of(
        "checkpoint/compatibility.py",
        f"{UNIT}/checkpoint/test_compatibility.py",
        (
            "other tokens accepted",
            "if (then.train_checksum, then.vocab_size) == (now.train_checksum, now.vocab_size):",
            "if True:",
        ),
        ("free keys refused", " and not _is_below(key, FREE)}", "}"),
        ("then and now exchanged", "(then.get(key), now.get(key))", "(now.get(key), then.get(key))"),
    ),
    *_of(
        "checkpoint/placement_record.py",
        f"{UNIT}/checkpoint/test_compatibility.py",
        ("clusters dealt round", "cluster // per_block for cluster", "cluster % shape.cluster for cluster"),
        ("version lost", "shape.expert_shards, record.version)", "shape.expert_shards)"),
    ),
    *_of(
        "checkpoint/sharded_tensor.py",
        f"{UNIT}/checkpoint/test_save_and_load.py {UNIT}/checkpoint/test_stateful.py",
        ("every row at the start", "Shard(rank * value.numel(), value", "Shard(0, value"),
        (
            "copies share their buffer",
            "self._buffers[name, shard.start] = buffer.copy_(shard.values)",
            "self._buffers[name, shard.start] = buffer = shard.values",
        ),
    ),
    *_of(
        "checkpoint/manifest.py",
        f"{UNIT}/checkpoint/test_trust.py {UNIT}/checkpoint/test_store.py",
        (
            "checksum of the manifest ignored",
            'content.pop("checksum", None) != _checksum(content)',
            'content.pop("checksum", None) is None',
        ),
    ),
    *_of(
        "checkpoint/model_state.py",
        f"{UNIT}/checkpoint/test_model_state.py",
        (
            "shards start at their parameter's start",
            "Shard(run.first + first - run.start, values",
            "Shard(run.first + first, values",
        ),
        ("values of the fragment's start", "values[first - start : last - start]", "values[: last - first]"),
    ),
    *_of(
        "checkpoint/resharding_planner.py",
        f"{UNIT}/checkpoint/test_save_and_load.py",
        (
            "offloaded values written at the shard's start",
            "shard.write(read_item.dest_offsets[0], tensor)",
            "shard.write(0, tensor)",
        ),
    ),
    *_of(
        "checkpoint/storage.py",
        f"{UNIT}/checkpoint/test_save_and_load.py {UNIT}/checkpoint/test_store.py",
        ("read from the stored shard's start", "[start : start + length]", "[:length]"),
        ("tensors with holes written", "if sum(length for _, length, _ in chunks) != record.numel:", "if False:"),
    ),
    *_of(
        "model/teacher_loss.py",
        f"{UNIT}/model/test_teacher_loss.py",
        ("teacher and model exchanged", "kl_div(log_prob_BSV, expected,", "kl_div(expected, log_prob_BSV,"),
        ("temperature of the model left out", "logits_BSV.float() / temperature", "logits_BSV.float()"),
        ("named tokens counted in the rest", "log_prob_BSV.scatter(-1, token_BSK, _LEAST)", "log_prob_BSV"),
    ),
    # engine
    *_of(
        "engine/gradient_norm.py",
        f"{UNIT}/engine/test_reductions.py",
        ("copies counted each", ".square() / copies", ".square()"),
        ("norm of this rank alone", "    dist.all_reduce(square)\n", ""),
        ("norm without offloaded gradients", "    square += elsewhere().to(device)\n", ""),
        ("square instead of the norm", "return square.sqrt().float()", "return square.float()"),
        ("small gradients enlarged", ".clamp(min=1.0)", ""),
        (
            "gradients clipped to 1",
            "(clip_norm / (norm + 1e-6)).clamp(max=1.0)",
            "(1.0 / (norm + 1e-6)).clamp(max=1.0)",
        ),
    ),
    *_of(
        "engine/deepspeed_engine.py",
        f"{UNIT}/engine/test_reductions.py",
        ("sum of the ranks' losses", "means = (loss_sum / per_stage", "means = (loss_sum"),
        ("a loss that is not finite on rank 0", "faults[self.process.rank] = ", "faults[0] = "),
        ("a fault spreads into the loss", "each.double().nan_to_num(0, 0, 0)", "each.double()"),
        ("loads of this rank alone", "        dist.all_reduce(packed)\n", ""),
        ("counts never cleared", "        balance.clear_counts()\n", ""),
        ("all ranks have to ask for the stop", "stops > 0,", "stops >= ranks,"),
        ("losses of sources of this rank alone", "total_2K=totals.view(2, -1)", "total_2K=mine_2K"),
        ("sum of router losses", "balance_loss / per_stage", "balance_loss"),
        (
            "losses exchanged",
            "loss_sum, divergence_sum, dropped, stops, idle_sum, balance_loss, z_loss = sums",
            "loss_sum, divergence_sum, dropped, stops, idle_sum, z_loss, balance_loss = sums",
        ),
    ),
    *_of(
        "engine/offloaded_adamw.py",
        f"{UNIT}/engine/test_lazy_updates.py",
        (
            "missed updates at the last learning rate",
            "step, rate, rule)\n            _round",
            "step, self._rates[-1], rule)\n            _round",
        ),
        ("missed updates as if made now", "self.steps - cluster.behind))", "self.steps))"),
        ("learning rates of the first steps", "[: len(self._rates) - furthest]", "[furthest:]"),
        (
            "active clusters not caught up",
            "            self.catch_up(cluster)\n            self._step",
            "            self._step",
        ),
        (
            "missed updates of the first chunk alone",
            "range(run.start, run.stop, CHUNK)",
            "range(run.start, run.start + 1, CHUNK)",
        ),
    ),
    *_of(
        "memory/offloaded_cluster.py",
        f"{UNIT}/engine/test_lazy_updates.py",
        ("weights used behind", "        self._schedule.before_use(self)\n", ""),
    ),
    *_of(
        "engine/loss_scale.py",
        f"{UNIT}/engine/test_loss_scale.py",
        (
            "overflows do not count against the window",
            "0 if overflow else self._good_steps + 1",
            "self._good_steps + 1",
        ),
        ("scale grows by overflows", "self.scale /= 2", "self.scale *= 2"),
    ),
    *_of(
        "moe/attached_loss.py",
        "tests/distributed/test_float16.py",
        ("attached losses not scaled", "weight * balance.loss_scale", "weight"),
    ),
    *_of(
        "engine/optimizer.py",
        f"{UNIT}/engine/test_reductions.py",
        ("vectors decay", ' and name.rpartition(".")[2] not in VECTORS', ""),
        ("embeddings decay", ' and "embedding" not in name', ""),
        ("router at the global rate", "UpdateRule(decay, optimizer.router_lr_scale)", "UpdateRule(decay, 1.0)"),
        (
            "feed-forward layers at the global rate",
            "UpdateRule(decay, optimizer.feed_forward_lr_scale)",
            "UpdateRule(decay, 1.0)",
        ),
    ),
    *_of(
        "engine/optimizer_state.py",
        "tests/distributed/test_training_state.py",
        (
            "fragments at the start of the partition",
            "tensor.view(-1)[offset : offset + length]",
            "tensor.view(-1)[:length]",
        ),
        ("trial step counts", "        self.steps = 0\n", "        pass\n"),
    ),
    *_of(
        "engine/gathered_optimizer_state.py",
        f"{UNIT}/engine/test_reductions.py",
        (
            "fragment at the parameter's start",
            "row_P[self.fragment.start : self.fragment.end]",
            "row_P[: self.fragment.end - self.fragment.start]",
        ),
        (
            "state of this rank alone",
            "        if self.divided:\n            dist",
            "        if False:\n            dist",
        ),
        (
            "fragment of the value's start",
            "whole[name].flatten()[fragment.start : fragment.end]",
            "whole[name].flatten()[: fragment.end - fragment.start]",
        ),
    ),
)
