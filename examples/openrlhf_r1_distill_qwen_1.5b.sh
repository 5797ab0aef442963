#!/usr/bin/env bash
# N-GRPO on DeepSeek-R1-Distill-Qwen-1.5B with the settings of the paper's table 6, in OpenRLHF 0.11.2 on 8 GPUs.
# Not run here: no such machine was at hand. Try it with --ngrpo.dry_run first, on one of the GPUs:
#
#     bash examples/openrlhf_r1_distill_qwen_1.5b.sh --ngrpo.dry_run
#
# The paper's: k = 3, rate 0.1, temperature 0.7, 4 samples a prompt, batches of 64 prompts, learning rate 1e-6, KL
# weight 0.001, prompts of 4,096 and responses of 8,192 tokens, one epoch of DeepScaleR. The rest is ours to choose.
# GRPO's arm is the same command with --ngrpo.mixing_rate 0; the control's, with --ngrpo.strategy anchor.
set -euo pipefail

OUT=${OUT:-runs/openrlhf_r1_distill_qwen_1.5b}
mkdir -p "$OUT"

cat > "$OUT/reward.py" <<'PYTHON'
"""1 for the right answer in the last \\boxed{}, by OpenRLHF's own comparison; it asks for one query at a time."""
import torch
from openrlhf.utils import extract_boxed_answer, grade_answer


# Its limit of time for sympy is off outside the main thread, where rewards are computed: for answers that are not checked
# for their size, grade in a process that can be ended.
def reward_func(queries, prompts, labels, **kwargs):
    answers = [extract_boxed_answer(query[len(prompt) :]) for query, prompt in zip(queries, prompts)]
    right = [answer is not None and grade_answer(answer, label) for answer, label in zip(answers, labels)]
    rewards = torch.tensor(right, dtype=torch.float32)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}
PYTHON

python -m ngrpo_ops.integrations.openrlhf \
    --ngrpo.k 3 \
    --ngrpo.mixing_rate 0.1 \
    --actor.model_name_or_path deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \
    --data.prompt_dataset agentica-org/DeepScaleR-Preview-Dataset \
    --data.input_key problem \
    --data.label_key answer \
    --data.apply_chat_template \
    --data.max_len 12288 \
    --reward.remote_url "$OUT/reward.py" \
    --rollout.max_new_tokens 8192 \
    --rollout.temperature 0.7 \
    --rollout.n_samples_per_prompt 4 \
    --rollout.batch_size 64 \
    --rollout.max_tokens_per_gpu 32768 \
    --train.batch_size 256 \
    --train.dynamic_batch_enable \
    --train.max_tokens_per_gpu 16384 \
    --train.num_episodes 1 \
    --train.max_epochs 1 \
    --actor.adam.lr 1e-6 \
    --actor.loss_agg_mode seq-mean-token-mean \
    --actor.gradient_checkpointing_enable \
    --algo.advantage.estimator group_norm \
    --algo.advantage.is_correction_level token \
    --algo.advantage.is_correction_mode clip \
    --algo.kl.use_loss \
    --algo.kl.estimator k3 \
    --algo.kl.init_coef 0.001 \
    --actor.num_nodes 1 \
    --actor.num_gpus_per_node 8 \
    --ref.num_nodes 1 \
    --ref.num_gpus_per_node 8 \
    --vllm.num_engines 8 \
    --vllm.tensor_parallel_size 1 \
    --vllm.gpu_memory_utilization 0.6 \
    --vllm.enable_sleep \
    --train.colocate_all \
    --ds.enable_sleep \
    --ds.packing_samples \
    --ds.zero_stage 2 \
    --logger.tensorboard_dir "$OUT/log" \
    --ckpt.output_dir "$OUT/model" \
    --ckpt.path "$OUT/checkpoints" \
    --ckpt.save_steps 50 \
    "$@"
