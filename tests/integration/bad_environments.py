"""Environments as nobody should write them, and some do; `test_bad_environments` installs them as a package."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time

import gymnasium
import numpy as np

from shoal.training.tasks.gym import GymTask

LENGTH = 10
CUT_AT = 5

print("a line that this module prints when it is imported")


class Plain(gymnasium.Env):
    """Shows how far its episode is, in [0, 1], four times; a reward of 1 per step, an end after ten."""

    def __init__(self):
        self.observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)
        self.steps = self.seed = 0

    def observation(self):
        return np.full(4, self.steps / LENGTH, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.seed = 0, self.seed if seed is None else seed
        return self.observation(), {}

    def step(self, action):
        self.steps += 1
        return self.observation(), 1.0, self.steps == LENGTH, False, {}


class Reused(Plain):
    """One array for all observations; cut in the middle of its way."""

    def __init__(self):
        super().__init__()
        self.array = np.zeros(4, np.float32)

    def observation(self):
        self.array[:] = self.steps / LENGTH
        return self.array

    def step(self, action):
        observation, reward, *_ = super().step(action)
        return observation, reward, False, self.steps == CUT_AT, {}


def stepping(change):
    """An environment whose step gives ``change`` of what it should."""

    class Changed(Plain):
        def step(self, action):
            return change(*super().step(action))

    return Changed


def resetting(change):
    class Changed(Plain):
        def reset(self, *, seed=None, options=None):
            return change(*super().reset(seed=seed))

    return Changed


def fail(error):
    raise error


def exit_at_once(*_):
    os._exit(3)


def hang(*_):
    while True:
        time.sleep(1)


def hang_in_c(*_):
    """Python's lock is held all the while."""
    ctypes.PyDLL(None).sleep(3600)


def hang_and_swallow(*_):
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(3600)


class BadConstructor(Plain):
    def __init__(self):
        super().__init__()
        raise ValueError("no display to draw on")


class HungConstructor(Plain):
    def __init__(self):
        super().__init__()
        hang()


class Unlucky(Plain):
    """Fails in its fourth step whenever it was seeded with an odd number, and so does every other one of that seed."""

    def step(self, action):
        if self.steps == 3 and self.seed % 2:
            raise RuntimeError(f"unlucky seed {self.seed}")
        return super().step(action)


class Forks(Plain):
    """Starts a process in its group, one that leaves it, and one that keeps whatever this process has open."""

    def __init__(self):
        super().__init__()
        sleep = ["sleep", os.environ["BAD_SLEEP_S"]]
        for command in (sleep, ["setsid", *sleep]):
            subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if os.fork() == 0:
            for number in range(3, 64):
                with contextlib.suppress(OSError):
                    os.set_inheritable(number, True)
            os.execvp("setsid", ["setsid", *sleep])


class Loud(Plain):
    def step(self, action):
        print("x" * 1000)
        os.write(1, b"straight to the descriptor\n")
        return super().step(action)


class Slow(Plain):
    """20 ms a step, 50 steps an episode."""

    def step(self, action):
        time.sleep(0.02)
        observation, reward, *_ = super().step(action)
        return np.minimum(observation, 1), reward, self.steps >= 50, False, {}


class Huge(Plain):
    def __init__(self):
        super().__init__()
        self.observation_space = gymnasium.spaces.Box(np.float32(0), np.float32(1), (10**6,), np.float32)


class BadClose(Plain):
    def step(self, action):
        return fail(ValueError("in a step"))

    def close(self):
        fail(KeyError("in close"))


class Here(Plain):
    """Works, unless the machine is the one where it does not."""

    def step(self, action):
        if "BAD_HERE" in os.environ and self.steps == 4:
            raise OSError("no licence server in reach")
        return super().step(action)


ENVIRONMENTS = {
    "Plain": Plain,
    "Reused": Reused,
    "WrongShape": stepping(lambda o, *rest: (o[:1], *rest)),
    "WrongDtype": stepping(lambda o, *rest: (o.astype(str), *rest)),
    "NanReward": stepping(lambda o, r, *rest: (o, float("nan"), *rest)),
    "EndlessReward": stepping(lambda o, r, *rest: (o, np.float64("inf"), *rest)),
    "NanShown": stepping(lambda o, *rest: (o * np.float32("nan"), *rest)),
    "EndlessShown": stepping(lambda o, *rest: (o + np.float32("inf"), *rest)),
    "ArrayReward": stepping(lambda o, r, *rest: (o, np.array([1.0, 2.0]), *rest)),
    "NoReward": stepping(lambda o, r, *rest: (o, None, *rest)),
    "FourValues": stepping(lambda o, r, end, cut, info: (o, r, end, info)),
    "ThreeOfReset": resetting(lambda o, info: (o, info, 0)),
    "BareReset": resetting(lambda o, info: o),
    "Outside": stepping(lambda o, *rest: (o + np.float32(2), *rest)),
    "KeyErrorInStep": stepping(lambda *_: fail(KeyError("speed"))),
    "ExitInStep": stepping(lambda *_: sys.exit(4)),
    "RaisesInReset": resetting(lambda *_: fail(ZeroDivisionError("the map is empty"))),
    "BadConstructor": BadConstructor,
    "HungStep": stepping(hang),
    "HungReset": resetting(hang),
    "HungConstructor": HungConstructor,
    "HungInC": stepping(hang_in_c),
    "HungAndSwallows": stepping(hang_and_swallow),
    "GoneAtOnce": stepping(exit_at_once),
    "Unlucky": Unlucky,
    "Forks": Forks,
    "Loud": Loud,
    "Slow": Slow,
    "Huge": Huge,
    "BadClose": BadClose,
    "Here": Here,
}


for name, made in ENVIRONMENTS.items():
    gymnasium.register(id=f"{name}-v0", entry_point=made, disable_env_checker=True)


def task(name):
    """The entry point of the scheme ``bad``."""
    return GymTask(f"{name}-v0")
