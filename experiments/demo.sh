#!/usr/bin/env bash
# The whole recipe in small, as `make demo` runs it. Every step is the ordinary command; the same call again goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
scale=${1:-tiny}
home=demo
pretrain=() sft=() reward=() sampling=() ppo=()
case $scale in
  tiny) ;;
  small) # three times the model, six times the text, and longer everywhere
    home=demo-small
    pretrain=(--set model.dim=192 --set model.layers=6 --set model.heads=6 --set model.hidden=512 --set tokens=6_000_000)
    sft=(--set data.epochs=2)
    reward=(--set data.epochs=2)
    sampling=(--set count=0 --set samples=16)
    ppo=(--set iterations=100)
    ;;
  *)
    echo "SCALE=$scale: tiny or small." >&2
    exit 1
    ;;
esac

step() { # title, what to look at, then the command
  printf '\n\033[1m%s\033[0m  %s\n$ python' "$1" "$2"
  printf ' %q' "${@:3}"
  printf '\n'
  python "${@:3}"
}

rewards=(--set "rewards.helpfulness=$home/rm-help/model" --set "rewards.safety=$home/rm-safe/model")

step 'Tokenizer.' 'Byte-pair encoding of the toy world; see how few characters a token has.' \
  experiments/train_tokenizer.py --workdir="$home/tokenizer"
step 'Pretraining.' 'Held-out loss falls in every genre; the samples at the end are made up, and grammatical.' \
  experiments/pretrain.py --set "tokenizer=$home/tokenizer/tokenizer.model" --workdir="$home/pretrain" "${pretrain[@]}"
step 'Fine-tuning.' 'It answers questions now, and stops; it also gives in to requests that it should decline.' \
  experiments/sft.py --config=tiny_v1 --set "init_from=$home/pretrain/model" --workdir="$home/sft" "${sft[@]}"
step 'Helpfulness reward model.' 'The clearer the raters were, the more often it agrees with them.' \
  experiments/reward_model.py --config=tiny_v1 --set "init_from=$home/sft/model" --workdir="$home/rm-help" "${reward[@]}"
step 'Safety reward model.' 'It is to find the answers that do harm (unsafe_recall).' \
  experiments/reward_model.py --config=tiny_safety --set "init_from=$home/sft/model" --workdir="$home/rm-safe" "${reward[@]}"
step 'Rejection sampling.' 'The best of many answers scores higher the more there are; the model learns from the best.' \
  experiments/rejection_sampling.py --set "sample_from=$home/sft/model" "${rewards[@]}" --workdir="$home/rs" "${sampling[@]}"
step 'Preferences.' 'The new model answers, and raters compare: what a reward model has to know now is what this model says.' \
  experiments/collect_preferences.py --set "models=$home/rs/model" --workdir="$home/preferences"
step 'Helpfulness reward model, renewed.' 'Of the new model it could hardly tell false answers from true ones; now it can.' \
  experiments/reward_model.py --config=tiny_renewed --set "init_from=$home/rm-help/model" \
  --set "data.mixture=jsonl:$home/preferences/preferences.jsonl" --workdir="$home/rm-renewed"
rewards=(--set "rewards.helpfulness=$home/rm-renewed/model" --set "rewards.safety=$home/rm-safe/model")
step 'PPO.' 'The held-out score rises; see whether the judge, an exact oracle, agrees, and how far KL says the model has gone.' \
  experiments/ppo.py --set "init_from=$home/rs/model" "${rewards[@]}" --workdir="$home/ppo" "${ppo[@]}"
for version in pretrain sft rs ppo; do
  step "Evaluation of $version." 'Held-out questions, graded by the exact oracle of the toy world.' \
    experiments/evaluate.py --model="$home/$version/model" --tasks=toy --chat --output="$home/eval/$version"
done
step 'Export.' 'PyTorch loads the result, and its logits are ours.' \
  experiments/convert.py --input="$home/ppo/model" --output="$home/export" --to=hf --verify
step 'Summary.' 'All stages in one table, and what each version answers to the same questions.' \
  experiments/demo.py --workdir="$home"
step 'Report.' 'Everything in pictures.' \
  experiments/report.py --workdir="$home"
