"""Mistakes that the tests must catch, each with the test that goes red: ``python tests/mutations.py`` tries them all.

Each mutation is applied to a copy of the source tree, never to the tree itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """One deliberate mistake: ``original`` becomes ``mistake`` in ``file``, and ``test`` must fail."""

    name: str
    file: str
    original: str
    mistake: str
    test: str


MUTATIONS = [
    Mutation("an adjoint that is not one", "operators/invflow_operators/superresolution.py",
             "return self.rows.transpose(self.columns.transpose(y).mT).mT",
             "return self.rows_inverse(self.columns_inverse(y).mT).mT",
             "tests/operators/test_operators.py"),
    Mutation("mean instead of sum in the likelihood", "invflow/likelihood.py",
             "return terms.flatten(2).sum(2)", "return terms.flatten(2).mean(2)", "tests/test_reward.py"),
    Mutation("time reversed in the MeanFlow target", "invflow/training/losses.py",
             "target = v + correction", "target = v - correction",
             "tests/training/test_losses.py::test_true_average_velocity_is_a_stationary_point"),
    Mutation("the map's gradient left in the observation term", "invflow/training/vfm.py",
             "fixed = {k: p.detach() for k, p in", "fixed = {k: p for k, p in",
             "tests/training/test_training.py::test_observation_term_leaves_the_map_alone"),
    Mutation("a global seed in the training loop", "invflow/training/loop.py",
             "    accelerator = Accelerator(", "    torch.manual_seed(settings.seed)\n    accelerator = Accelerator(",
             "tests/training/test_training.py::test_training_does_not_touch_the_global_seed"),
    Mutation("the loss averaged over the state", "invflow/training/losses.py",
             ".square().flatten(1).sum(dim=1)\n\n\ndef gaussian_kl",
             ".square().flatten(1).mean(dim=1)\n\n\ndef gaussian_kl",
             "tests/training/test_losses.py::test_loss_is_summed_over_the_state_and_reaches_the_noise"),
    Mutation("the noise cut off from the MeanFlow loss", "invflow/training/losses.py",
             "    v = data - noise\n", "    noise = noise.detach()\n    v = data - noise\n",
             "tests/training/test_losses.py::test_loss_is_summed_over_the_state_and_reaches_the_noise"),
    Mutation("a checkpoint without the optimiser's state", "invflow/training/loop.py",
             "            optimizer.state[p] = state\n", "            pass\n",
             "tests/training/test_training.py::test_resuming_gives_the_same_bits"),
    Mutation("noise drawn chunk by chunk", "invflow/solvers/vfm.py",
             "z = torch.addcmul(mean[owner[part]], std[owner[part]], noise[part])",
             "z = torch.addcmul(mean[owner[part]], std[owner[part]], noise[: len(owner[part])])",
             "tests/solvers/test_vfm.py::test_samples_do_not_depend_on_chunks"),
    Mutation("an adapter accepted by any map", "invflow/models/adapter.py",
             "if self.trained_for is not None and own != self.trained_for:", "if False:",
             "tests/solvers/test_vfm.py::test_adapter_of_another_map_is_refused"),
    Mutation("a shift that the density of q forgets", "invflow/solvers/tilting/fmtt.py",
             "ratio = -(0.5 * wide.square() + wide * precise(pushed.flatten(1))).sum(1)", "ratio = 0 * wide.sum(1)",
             "tests/solvers/tilting/test_tilting_problems.py::test_renoising_tilts_the_ring_itself"),
    Mutation("an annealed schedule that takes a mean over pixels for one of them",
             "invflow/solvers/tilting/schedules.py",
             "gain = measured_gain(reward)", "gain = 1.0",
             "tests/solvers/tilting/test_tilting.py::test_an_annealed_schedule_knows_what_the_operator_makes_of_a_pixel"),
    Mutation("weights that start at zero under an annealed schedule", "invflow/solvers/tilting/fmtt.py",
             '        if self.weights == "jarzynski":\n            run.path = self._tilt(run)\n',
             '        run.path = self._tilt(run) if self.weights == "jarzynski" else -self._tilt(run)\n',
             "tests/solvers/tilting/test_tilting_problems.py::test_an_annealed_schedule_starts_at_a_weight"),
    Mutation("rejection that keeps too much", "problems/invflow_problems/rejection.py",
             "uniform.to(values.device).log() < values - bound",
             "uniform.to(values.device).log() < 0.7 * (values - bound)",
             "tests/solvers/tilting/test_tilting_problems.py::test_wavy_ring_rejection_against_quadrature"),
    Mutation("the tilted component's mass without its normalisation", "problems/invflow_problems/half_plane.py",
             ".exp() / shrink**0.5 * torch", ".exp() * torch",
             "tests/solvers/tilting/test_tilting_problems.py::test_half_plane_closed_form_against_quadrature"),
    Mutation("a mean over the group that leaves out the identity", "invflow/rewards/images.py",
             "return (x + sum(moved)) / (1 + len(moved))", "return sum(moved) / len(moved)",
             "tests/rewards/test_image_rewards.py::test_invariances"),
    Mutation("rows of A that are not orthogonal", "problems/invflow_problems/mixture25.py",
             "    return q * r.diagonal().sign()", "    return gaussian",
             "tests/solvers/tilting/test_tilting_problems.py::test_mixture25_is_as_published"),
    Mutation("a repeated reward that selects nothing", "invflow/reward.py",
             "other.num_observations = len(as_index(index, self.num_observations))", "pass",
             "tests/solvers/tilting/test_tilting_problems.py::test_repeats"),
    Mutation("a conjugate proposal that forgets what A does not see", "invflow/solvers/tilting/conjugate.py",
             "kept, residual)", "torch.ones_like(kept), residual)", "tests/solvers/tilting/test_conjugate.py"),
    Mutation("a thermodynamic length without its root", "invflow/solvers/tilting/record.py",
             "gap.sqrt().sum(1)", "gap.sum(1)", "tests/solvers/tilting/test_path_record.py"),
    Mutation("a search for the worst", "invflow/solvers/search.py", "tried[1] > best[1]", "tried[1] < best[1]",
             "tests/solvers/test_search.py"),
    Mutation("ranks judged on one side", "invflow/metrics/ranks.py",
             "return np.minimum(below, below[::-1, ::-1])", "return below",
             "tests/metrics/test_metrics_calibration.py"),
    Mutation("verdicts that forget how many there are", "invflow/evaluation/certificate/judgement.py",
             "passed = not corrected <= alpha", "passed = not p_value <= alpha",
             "tests/evaluation/test_calibration.py::test_an_exact_posterior_fails_at_most_at_the_nominal_rate"),
    Mutation("truths from the problem's prior, not the solver's", "invflow/evaluation/calibrate.py",
             "own = type(solver).prior_samples is not Solver.prior_samples", "own = False",
             "tests/evaluation/test_calibration.py::test_truths_from_data_show_the_misfit_of_the_prior"),
    Mutation("noise that depends on the chunk", "invflow/solvers/field/rows.py", "seeds[first:last], device",
             "seeds[: last - first], device", "tests/solvers/field/test_field_samplers.py::test_contract"),
    Mutation("Flower without the noise of its measurement", "invflow/solvers/field/flower.py",
             "y + sigma * rows.noise(y)", "y",
             "tests/solvers/field/test_field_samplers.py::test_each_makes_what_its_recursion_says"),
    Mutation("paired differences of other pairs", "invflow/evaluation/results/results.py",
             "(pair[0] - pair[1])[", "(pair[0] - pair[1].flip(0))[",
             "tests/evaluation/test_compare.py::test_paired_differences_see_what_means_cannot"),
    Mutation("a map's error that grows with the noise", "invflow/training/vfm.py",
             "weight * (square / count - noise_variance)", "weight * (square / count)",
             "tests/training/test_training.py::test_model_error_vanishes_where_the_residual_is_noise"),
    Mutation("Hamiltonian moves that forget what they gained", "invflow/solvers/noise/hamiltonian.py",
             " - (extra - start) - gained", " - gained",
             "tests/solvers/noise/test_noise_chains.py::test_hamiltonian_moves_leave_a_nonlinear_target_as_it_is"),
    Mutation("randomise-then-optimise weights without their determinant", "invflow/solvers/noise/rto_weights.py",
             "torch.linalg.slogdet(derivative)[1] - 0.5 * torch", "- 0.5 * torch",
             "tests/solvers/noise/test_noise_rto.py::test_weights_against_quadrature"),
    Mutation("measurement noise of the wrong size in randomise-then-optimise", "invflow/solvers/noise/perturbed.py",
             "likelihood.y + sigma * error", "likelihood.y + error",
             "tests/solvers/noise/test_noise_rto.py::test_exact_where_all_is_linear"),
    Mutation("names unescaped in the report", "invflow/evaluation/page/elements.py",
             "c if isinstance(c, Markup) else html.escape(c)", "c", "tests/evaluation/test_html_report.py"),
    Mutation("better and worse swapped in the report", "invflow/evaluation/page/table.py",
             '(difference < 0) == (better == "low")', '(difference > 0) == (better == "low")',
             "tests/evaluation/test_html_report.py::test_differences_are_coloured_where_a_direction_is_better"),
    Mutation("an option of the command line renamed", "invflow/cli/solve.py",
             'factor: Annotated[int | None, typer.Option(\n        min=1',
             'factor: Annotated[int | None, typer.Option(\n        "--scale", min=1',
             "tests/test_docs.py::test_commands_exist"),
    Mutation("an effective sample size that its example contradicts", "invflow/smc.py",
             "ess = (2 * log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)).exp()",
             "ess = (log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)).exp() * 3",
             "tests/test_doctests.py"),
    Mutation("noise right on average only", "invflow/testing/_densities.py",
             "if clean is None else clean > clean.median()", "",
             "tests/testing/test_broken_plugins.py::test_is_caught_and_named"),
    Mutation("a reversed flow taken", "invflow/testing/flowmaps.py",
             "if exact and prior.independent_noise:", "if False:",
             "tests/testing/test_broken_plugins.py::test_is_caught_and_named"),
    Mutation("a cost believed", "invflow/testing/solvers.py",
             "nfe.forward >= made[0] - 1e-6 and nfe.backward >= made[1] - 1e-6", "True",
             "tests/testing/test_broken_plugins.py::test_is_caught_and_named"),
    Mutation("a seed that the test had set", "invflow/testing/_tools.py",
             "    torch.default_generator.manual_seed(_UNLIKELY_SEED)\n", "",
             "tests/testing/test_broken_plugins.py"),
    Mutation("a draft left behind", "invflow/cli/new.py",
             "        shutil.rmtree(draft, ignore_errors=True)\n", "", "tests/testing/test_plugin_kit.py"),
    Mutation("a plug-in before the built-in", "invflow/_core/plugins.py",
             "startswith(_BUILT_IN)", 'startswith("invflow_")', "tests/testing/test_plugin_kit.py"),
    Mutation("the physics' noise doubled", "invflow/deepinv_bridge/reconstructor.py",
             "        return torch.as_tensor(level).flatten()",
             "        return 2 * torch.as_tensor(level).flatten()", "tests/testing/test_plugin_kit.py"),
    Mutation("two jumps averaged in the wrong order", "invflow/training/losses.py",
             "torch.lerp(second, first,", "torch.lerp(first, second,",
             "tests/training/test_losses.py::test_two_jumps_have_the_average_velocity_of_one"),
    Mutation("the semigroup's target moves the noise", "invflow/training/losses.py",
             "x = torch.where(apart, x.detach(), x)", "x = x",
             "tests/training/test_losses.py::test_semigroup_loss_is_consistency_apart_and_flow_matching_together"),
    Mutation("displacement for velocity in the last stage", "invflow/training/consolidation.py",
             "(u - (end - start) / gap)", "(u - (end - start))",
             "tests/training/test_consolidation.py::test_one_step_learns_what_two_do"),
    Mutation("the sign of other people's velocity", "invflow/models/diffusers/paths.py",
             "return -predict(x", "return predict(x", "tests/models/test_diffusers.py"),
    Mutation("codes drawn where the mean is due", "invflow/models/diffusers/networks.py",
             "latent_dist.mode()", "latent_dist.sample()", "tests/models/test_diffusers_models.py"),
    Mutation("a distillation without its correction", "invflow/training/distillation.py",
             "target = b + correction", "target = b", "tests/training/test_distillation.py"),
    Mutation("a map's error of another size than it says", "benchmarks/tables/tilting_weights.py",
             "self.size * self.spread * math.sqrt(2)", "self.size * self.spread",
             "tests/benchmarks/test_tilting_tables.py::test_the_error_of_the_map_has_the_size_that_it_says"),
    Mutation("a chunk that fails cut to single rows", "invflow/_core/chunks.py",
             "self.rows = min(self.rows, -(-count // 2))", "self.rows = 1",
             "tests/core/test_out_of_memory.py::test_vfm_goes_on_with_half_the_rows"),
    Mutation("weights taken for what a row needs", "invflow/flowmap.py",
             "if storage.data_ptr() not in own:", "if True:",
             "tests/core/test_out_of_memory.py::test_bytes_of_a_row_are_those_that_its_backward_pass_reads"),
    Mutation("all of a GPU's free memory taken", "invflow/flowmap.py", "SHARE = 0.5", "SHARE = 1.0",
             "tests/core/test_out_of_memory.py::test_rows_fill_half_of_the_free_memory_of_a_gpu"),
    Mutation("compiled networks transformed", "invflow/models/compiled.py",
             "if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:",
             "if False:",
             "tests/models/test_compiled.py::test_forward_mode_passes_through"),
    Mutation("results that a CUDA graph writes over", "invflow/models/compiled.py",
             "return compiled(*args).clone()", "return compiled(*args)",
             "tests/models/test_compiled.py::test_results_outlive_the_next_call"),
    Mutation("fresh noise after a failed attempt", "invflow/solvers/field/rows.py",
             "            noise = RowNoise(seeds, part, generator.device)",
             "            noise = RowNoise(RowNoise.seeds(total, generator), part, generator.device)",
             "tests/core/test_out_of_memory.py"),
    Mutation("NaN rewards taken for zero weights", "invflow/solvers/noise/target.py",
             "bad = broken | scores.isnan() | (scores == torch.inf)", "bad = broken & scores.isnan()",
             "tests/test_not_finite.py"),
    Mutation("tensors whose strides hinder their bytes", "invflow/_core/records.py",
             "value.as_strided((value.numel(),), (1,))", "value.reshape(-1)", "tests/test_posterior.py"),
    Mutation("a digest that is not compared", "invflow/_core/folders.py",
             "if known is not None and known != digest", "if False and known != digest", "tests/test_fuzz.py"),
    Mutation("planes of colour taken for pixels", "invflow/datasets/sixteen_bits.py",
             "planes, extra = channels if tags.get(284, 1) == 2 else 1,", "planes, extra = 1,",
             "tests/datasets/test_photos_files.py::test_planes_of_colour_are_exact"),
    Mutation("a negative in place of a picture", "invflow/datasets/files.py",
             "return 1 - values if file.tag_v2.get(262) == 0 else values", "return values",
             "tests/datasets/test_photos_files.py::test_grey_is_exact_whether_white_or_black_is_zero"),
    Mutation("any format of Pillow's",
             "invflow/datasets/files.py", "Image.open(path, formats=known)", "Image.open(path)",
             "tests/test_fuzz.py::test_postscript_under_a_pictures_name_is_not_handed_to_ghostscript"),
    Mutation("a CRPS that is not fair", "invflow/metrics/quality.py",
             "half_sum = _ratio(half_sum, 2 * half_mass)", "half_sum = half_sum",
             "tests/test_properties_metrics.py"),
    Mutation("chunks of a resumed calibration drawn as the first", "invflow/evaluation/calibrate.py",
             'f"chunk {rows.start}"', 'f"chunk {rows.start - start}"',
             "tests/benchmarks/test_calibration_table.py::test_a_killed_table_goes_on"),
    Mutation("small digits transposed", "problems/invflow_problems/small_digits.py",
             "decode(state).unflatten(1, SHAPE)", "decode(state).unflatten(1, SHAPE).mT",
             "tests/problems/test_small_digits.py::test_the_prior_keeps_the_contract"),
    Mutation("a Heun step that corrects too little", "invflow/solvers/tilting/kernels.py",
             "0.5 * (self.end - self.start) * (after - before)", "0.4 * (self.end - self.start) * (after - before)",
             "tests/solvers/tilting/test_tilting.py::test_the_error_of_heun_steps_is_of_second_order"),
    Mutation("an annealed schedule that watches the narrowest direction", "invflow/solvers/tilting/annealing.py",
             "torch.linalg.eigvalsh(covariance)[:, -1]", "torch.linalg.eigvalsh(covariance)[:, 0]",
             "tests/solvers/tilting/test_annealing.py::test_schedule_is_the_widest_direction_of_the_unknown"),
    Mutation("bent maps called converged", "invflow/solvers/noise/convergence.py",
             "(~(bend <= _MOST_BEND),", "(bend < 0,",
             "tests/solvers/noise/test_noise_rto.py::test_wrong_shares_of_modes_are_found_without_the_truth"),
    Mutation("a denoiser told the noise of images, not of states", "invflow/solvers/baselines/plug_and_play.py",
             "noise = level.to(image) / abs(affine[0])", "noise = level.to(image)",
             "tests/solvers/field/test_splitting.py::test_plug_and_play_denoises_with_one_call_that_is_the_posterior_mean"),
    Mutation("noise levels that fall evenly, not in the logarithm", "invflow/solvers/baselines/plug_and_play.py",
             "self.first ** (1 - share) * last**share", "self.first * (1 - share) + last * share",
             "tests/solvers/field/test_splitting.py::test_plug_and_play_levels_fall_evenly_in_the_logarithm_and_never_under_the_noise"),
    Mutation("denoising under the measurement's own noise", "invflow/solvers/baselines/plug_and_play.py",
             ".clamp(min=last)  # never", "  # never",
             "tests/solvers/field/test_splitting.py::test_plug_and_play_levels_fall_evenly_in_the_logarithm_and_never_under_the_noise"),
    Mutation("total variation that counts the axes apart", "invflow/solvers/baselines/total_variation.py",
             "torch.linalg.vector_norm(slope, dim=", "torch.linalg.vector_norm(slope, ord=1, dim=",
             "tests/solvers/field/test_splitting.py::test_total_variation_finds_the_minimum_that_another_method_finds"),
    Mutation("a Wiener filter that forgets the mean", "invflow/solvers/baselines/classical.py",
             'return mean + found, {"iterations": torch.zeros(len(y))}',
             'return found, {"iterations": torch.zeros(len(y))}',
             "tests/solvers/baselines/test_classical.py::test_wiener_is_the_posterior_mean_of_the_stationary_gaussian"),
    Mutation("conjugate gradients that move on for the others' sake", "invflow/_core/conjugate_gradients.py",
             "active = size > target\n        if tol",
             "active = (size > target).any().expand_as(size)\n        if tol",
             "tests/solvers/field/test_splitting.py::test_a_row_that_has_arrived_stays_where_it_would_be_alone"),
    Mutation("directions without the preconditioner", "invflow/_core/conjugate_gradients.py",
             "direction = scaled + scale(new", "direction = residual + scale(new",
             "tests/solvers/field/test_splitting.py::test_the_linear_solver_solves_and_stops"),
    Mutation("two layers of zeros after each other", "invflow/models/spectral_adapter.py",
             "nn.init.zeros_(self.problem.weight)\n",
             "nn.init.zeros_(self.problem.weight)\n        nn.init.zeros_(self.widths.weight)\n",
             "tests/models/test_spectral_adapter.py::test_every_weight_of_a_fresh_adapter_can_learn"),
    Mutation("spreads that begin as if nothing were hidden", "invflow/models/spectral_adapter.py",
             "avg_pool2d(pad(observed, ", "avg_pool2d(pad(torch.ones_like(observed), ",
             "tests/models/test_spectral_adapter.py::test_adapter_begins_at_the_spread_of_the_prior_in_blocks_that_are_hidden"),
    Mutation("a kernel's summary that is not turned with the image", "invflow/models/spectral_adapter.py",
             "            u, v = v, -u\n", "            u, v = u, v\n",
             "tests/models/test_spectral_adapter.py::test_the_summary_turns_with_the_kernel"),
    Mutation("a correction that is not turned back", "invflow/models/spectral_adapter.py",
             "rot90(-turns, (2, 3))", "rot90(turns, (2, 3))",
             "tests/models/test_spectral_adapter.py::test_average_is_over_each_symmetry_once"),
    Mutation("a spread of the class before", "invflow/models/spectral_adapter.py",
             "return factors[classes].view", "return factors[classes - 1].view",
             "tests/models/test_spectral_adapter.py::test_spread_multiplies_the_deviations_of_its_class"),
    Mutation("processes that do not ask each other", "invflow/training/loop.py",
             "    if accelerator.num_processes == 1:\n        return stop()\n",
             "    if True:\n        return stop() and accelerator.num_processes == 1\n",
             "tests/training/test_processes.py::test_two_interrupted_processes_stop_together_and_go_on"),
    Mutation("a conjugate proposal that does not ask the prior how far its images vary",
             "invflow/solvers/tilting/fmtt.py",
             "self.conjugate = Conjugate.for_map(prior)", "self.conjugate = Conjugate()",
             "tests/solvers/tilting/test_conjugate.py::test_a_prior_of_correlated_images_is_conditioned_without_overstepping"),
    Mutation("a mask that never comes down to its own noise", "invflow/linear/spectral.py",
             "for level in LEVELS[1:]:", "for level in LEVELS[1:-1]:",
             "tests/linear/test_spectral.py::test_gaussian_estimate_is_the_posterior_mean"),
    Mutation("low noise from the first step on", "invflow/linear/spectral.py",
             "sigma.to(y).clamp(min=level)", "sigma.to(y).clamp(min=0.0)",
             "tests/linear/test_spectral.py::test_low_noise_is_reached_from_above"),
    Mutation("crops taken for all that there are", "invflow/training/spread.py",
             "share = level * (1 + 1 / max(groups, 1))", "share = level",
             "tests/training/test_photo_training.py::test_a_new_group_is_covered_as_often_as_asked"),
    Mutation("a spread fitted without the level", "invflow/training/spread.py",
             "/ NormalDist().inv_cdf((1 + level) / 2)", "/ NormalDist().inv_cdf(level)",
             "tests/training/test_photo_training.py::test_the_factor_of_the_spread_is_what_is_missing"),
    Mutation("tiles that overlap by a stride too little", "invflow/nets/unet.py",
             "return -(-reach // self.stride) * self.stride", "return reach // self.stride * self.stride",
             "tests/nets/test_photos_unet.py::test_halo_is_the_reach_of_an_output_pixel"),
    Mutation("a score of pairs that is not fair", "invflow/training/losses.py",
             "- (first - second).abs())", "- 0.5 * (first - second).abs())",
             "tests/training/test_photo_training.py::test_pair_score_is_the_fair_crps_of_two_samples"),
    Mutation("a batch shared out evenly", "invflow/training/vfm.py",
             "[problem.share for problem in self.problems]", "[1.0 for problem in self.problems]",
             "tests/training/test_training.py::test_rows_of_a_batch_are_shared_out_as_asked"),
    Mutation("one noise for all photographs", "benchmarks/tables/photo_parts.py",
             "derive_seed(seed, picture.name, task)", "derive_seed(seed, task)",
             "tests/benchmarks/test_photo_table.py::test_observations_do_not_depend_on_the_solver_or_on_the_other_pictures"),
    Mutation("settings that forget the adapter", "invflow/solvers/vfm.py",
             '"adapter": fingerprint(adapter)}', '"adapter": fingerprint(prior)}',
             "tests/solvers/test_vfm.py::test_settings_tell_one_adapter_from_another"),
    Mutation("a division by the gap between equal times", "invflow/training/losses.py",
             "share = torch.where(t > s, (middle - s) / (t - s), 0.5)", "share = (middle - s) / (t - s)",
             "tests/training/test_losses.py::test_two_draws_of_the_same_time_are_no_division_by_zero"),
]


def survives(mutation: Mutation) -> bool:
    """Whether the test stays green although the mistake is in."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        ignore = shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", "runs", ".venv", "venv", ".*_cache")
        shutil.copytree(ROOT, tree, ignore=ignore)
        path = tree / mutation.file
        text = path.read_text()
        if text.count(mutation.original) != 1:
            raise SystemExit(f"{mutation.name}: found {text.count(mutation.original)} times in {mutation.file}")
        path.write_text(text.replace(mutation.original, mutation.mistake))
        search = os.pathsep.join(str(tree / part) for part in (".", "operators", "problems"))
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", mutation.test]
        result = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": search}, capture_output=True,
                                text=True, check=False)
        if result.returncode not in (0, 1):
            raise SystemExit(f"{mutation.name}: pytest ended with {result.returncode}\n{result.stdout[-2000:]}")
        return result.returncode == 0


def main() -> None:
    """Try the mutations whose names contain a word, or all; exit with 1 if a test lets one through."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("words", nargs="*", help="of the mutations' names; none: all, which takes long")
    words = parser.parse_args().words
    survivors = []
    for mutation in [m for m in MUTATIONS if not words or any(word in m.name for word in words)]:
        alive = survives(mutation)
        print(f"{'SURVIVES' if alive else 'caught':9s} {mutation.name} ({mutation.test})", flush=True)
        survivors += [mutation.name] * alive
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
