"""The training stage of an iteration: pairs in, the next policy out."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import set_seed

from tso_fast.config.settings import TrainConfig
from tso_fast.errors import TrainingError
from tso_fast.files.rows import BadRows, read_pairs
from tso_fast.files.run import Run
from tso_fast.matrix import ModelMatrix
from tso_fast.progress import console
from tso_fast.training.batches import encode_pairs
from tso_fast.training.load import load_policy, save_policy
from tso_fast.training.monitors import drift_warnings
from tso_fast.training.optimise import optimise
from tso_fast.training.reference import other_weights, reference_weights, running_mean, save_ema, weights_key


def train_iteration(config: TrainConfig, matrix: ModelMatrix, run: Run, t: int, accelerator: Accelerator) -> None:
    """Trains the policy on the pairs of iteration ``t``, saves it and commits the stage; every process takes part.

    Raises:
        TrainingError: no pair fits the context, or going on would waste the run.
    """
    files = run.iteration(t)
    given = read_pairs(files.pairs, BadRows())
    pairs, too_long, truncated = encode_pairs(
        matrix.tokenizer, given, matrix.context, config.max_length, config.revision_template
    )
    if not pairs:
        raise TrainingError(
            f"iteration {t}: every pair is longer than the context of {matrix.context} tokens, or its prompt than "
            f"max_length {config.max_length}"
        )
    if accelerator.is_main_process and (truncated or too_long):
        console.print(
            f"iteration {t}: of {len(given)} pairs {len(truncated)} are cut to max_length {config.max_length} and "
            f"{len(too_long)} left out as too long"
        )
    before = [info for k in range(1, t) if (info := run.info(run.iteration(k).stage("train")))]
    reference = reference_weights(config, matrix, run, t)
    set_seed(config.seed)
    policy = load_policy(config, matrix.policy.weights, accelerator, has_adapter=config.peft == "lora")
    own = reference if reference != matrix.policy.weights else None
    mean = running_mean(config, policy, own, accelerator)
    info = optimise(
        policy,
        pairs,
        config,
        files=files,
        accelerator=accelerator,
        reference=own,
        reference_key=weights_key(reference),
        others=other_weights(config, matrix),
        mean=mean,
        pad_token_id=matrix.tokenizer.pad_token_id or 0,
        steps_before=sum(of["steps"] for of in before),
        num_iterations=config.num_iterations,
    )
    written = [files.policy]
    save_policy(policy, matrix.tokenizer, files.policy, accelerator)
    if config.reference == "ema":
        written.append(files.reference)
        if mean is None:
            save_ema(config, policy, matrix.tokenizer, reference, files.reference, accelerator)
        else:
            with mean.in_place_of(policy):
                save_policy(policy, matrix.tokenizer, files.reference, accelerator)
    if config.keep_optimizer:
        written.append(files.optimizer)
    if accelerator.is_main_process:
        generated = run.info(files.stage("generate"))
        assert generated is not None
        info |= {"too_long": len(too_long), "truncated": len(truncated)}
        info |= {key: generated[key] for key in ("generated_tokens", "distinct_responses")}
        info["warnings"] = drift_warnings([*before, info])
        run.commit(files.stage("train"), written, info)
        for warning in info["warnings"]:
            console.print(f"warning: iteration {t}: {warning}", style="yellow")
    accelerator.wait_for_everyone()
