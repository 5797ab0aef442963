#!/usr/bin/env bash
# N-GRPO on DeepSeek-R1-Distill-Qwen-1.5B with the settings of the paper's table 6, in verl 0.9.1 on 8 GPUs.
# Not run here: no such machine was at hand. Try it with +ngrpo.dry_run=True first, on one of the GPUs:
#
#     bash examples/verl_r1_distill_qwen_1.5b.sh +ngrpo.dry_run=True
#
# The paper's: k = 3, rate 0.1, temperature 0.7, 4 samples a prompt, batches of 64 prompts, learning rate 1e-6, KL
# weight 0.001, prompts of 4,096 and responses of 8,192 tokens, one epoch of DeepScaleR; evaluation at temperature 0.6,
# top-p 0.95, 32 samples. The rest is ours to choose. GRPO's arm is the same command with +ngrpo.mixing_rate=0; the
# control's, with +ngrpo.strategy=anchor.
set -euo pipefail

OUT=${OUT:-runs/verl_r1_distill_qwen_1.5b}
mkdir -p "$OUT"

cat > "$OUT/reward.py" <<'PYTHON'
"""1 for the right answer in the last \\boxed{}, by verl's own comparison of texts."""
from verl.utils.reward_score.math_reward import compute_score as score


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return score(solution_str, ground_truth)
PYTHON

cat > "$OUT/data.py" <<'PYTHON'
"""Prompts of DeepScaleR and of AIME 2025 as verl reads them."""
import sys

from datasets import load_dataset

ASK = "Let's think step by step and output the final answer within \\boxed{}."


def verl_row(problem, answer, source, index):
    return {
        "data_source": source, "ability": "math", "prompt": [{"role": "user", "content": f"{problem} {ASK}"}],
        "reward_model": {"style": "rule", "ground_truth": str(answer)}, "extra_info": {"index": index},
    }


if __name__ == "__main__":
    for name, file in (("agentica-org/DeepScaleR-Preview-Dataset", "train"), ("math-ai/aime25", "test")):
        data = load_dataset(name, split=file)
        rows = data.map(lambda x, i: verl_row(x["problem"], x["answer"], name, i), True, remove_columns=data.column_names)
        rows.to_parquet(f"{sys.argv[1]}/{file}.parquet")
PYTHON
[ -e "$OUT/test.parquet" ] || python "$OUT/data.py" "$OUT"

python -m ngrpo_ops.integrations.verl \
    +ngrpo.k=3 \
    +ngrpo.mixing_rate=0.1 \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    data.train_files="$OUT/train.parquet" \
    data.val_files="$OUT/test.parquet" \
    data.train_batch_size=64 \
    data.max_prompt_length=4096 \
    data.max_response_length=8192 \
    data.filter_overlong_prompts=True \
    reward.custom_reward_function.path="$OUT/reward.py" \
    actor_rollout_ref.model.path=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=4 \
    actor_rollout_ref.rollout.temperature=0.7 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.val_kwargs.n=32 \
    actor_rollout_ref.rollout.val_kwargs.do_sample=True \
    actor_rollout_ref.rollout.val_kwargs.temperature=0.6 \
    actor_rollout_ref.rollout.val_kwargs.top_p=0.95 \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=1 \
    trainer.total_epochs=1 \
    trainer.save_freq=50 \
    trainer.test_freq=50 \
    trainer.logger='[console,tensorboard]' \
    trainer.project_name=ngrpo \
    trainer.experiment_name=r1_distill_qwen_1.5b \
    trainer.default_local_dir="$OUT/checkpoints" \
    "$@"
