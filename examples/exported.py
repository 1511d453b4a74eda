"""Run a policy that `shoal export` wrote, without Shoal: Gymnasium, NumPy and onnxruntime are all it takes.

pip install onnxruntime gymnasium
shoal export SWARM --to policy.onnx
python examples/exported.py policy.onnx --task CartPole-v1
"""

from __future__ import annotations

import argparse

import gymnasium
import numpy as np
import onnxruntime


def main() -> None:
    """Play some episodes, and print what each earns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="an .onnx file")
    parser.add_argument("--task", default="CartPole-v1", help="a Gymnasium id")
    parser.add_argument("--episodes", type=int, default=1)
    options = parser.parse_args()
    session = onnxruntime.InferenceSession(options.policy, providers=["CPUExecutionProvider"])
    takes = {each.name: each for each in session.get_inputs()}
    dtype = np.uint8 if takes["observation"].type == "tensor(uint8)" else np.float32
    env = gymnasium.make(options.task)
    for episode in range(options.episodes):
        observation, _ = env.reset(seed=episode)
        total, is_over = 0.0, False
        # A policy that remembers takes its memory, which is zeros at first, and gives that of the next step.
        memory = {"memory": np.zeros((1, takes["memory"].shape[1]), np.float32)} if "memory" in takes else {}
        while not is_over:
            actions, *after = session.run(None, {"observation": np.asarray(observation, dtype)[np.newaxis], **memory})
            memory = dict(zip(memory, after, strict=True))
            observation, reward, terminated, truncated, _ = env.step(actions[0])
            total, is_over = total + float(reward), terminated or truncated
        print(f"episode {episode}  return {total:g}", flush=True)
    env.close()


if __name__ == "__main__":
    main()
