"""Put on PYTHONPATH, it lets a process die at a named call: `kill -9`, once, without a hook in the code that dies.

`points.json` beside this file lists `module:qualified name` of the functions to watch. `armed.json` holds
`{"point": "module:name", "when": "before" | "after", "call": n, "until": null | "module:name"}`. The process that
reaches it renames the file to `spent.json` and is gone; or, where it names an end, stands still there until any process
has called that, which removes the file. Only the standard library is used: this runs before anything else in every
Python process.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ARMED = HERE / "armed.json"
SPENT = HERE / "spent.json"


class Counter:
    """How often this process has reached the armed point since it was armed."""

    plan = None
    reached = 0


def reach(point, when):
    try:
        text = ARMED.read_bytes()
    except FileNotFoundError:
        release(point, when)
        return
    if text != Counter.plan:
        Counter.plan, Counter.reached = text, 0
    plan = json.loads(text)
    if (plan["point"], plan["when"]) != (point, when):
        return
    Counter.reached += 1
    if Counter.reached == plan["call"]:
        try:
            os.rename(ARMED, SPENT)
        except FileNotFoundError:
            return  # another process was faster
        if plan["until"] is None:
            os.kill(os.getpid(), signal.SIGKILL)
        while SPENT.exists():
            time.sleep(0.01)


def release(point, when):
    """Lets go the process that stands still until this call has returned."""
    try:
        plan = json.loads(SPENT.read_bytes())
    except FileNotFoundError:
        return  # also where another process has just let go
    if when == "after" and plan["until"] == point:
        SPENT.unlink(missing_ok=True)


def watch(owner, name, point):
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args, **kwargs):
        reach(point, "before")
        result = original(*args, **kwargs)
        reach(point, "after")
        return result

    setattr(owner, name, watched)


def watch_all(module, points):
    for point in points:
        owner = module
        *parents, name = point.split(":")[1].split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        watch(owner, name, point)


class Watching(importlib.abc.Loader):
    """Executes a module as its own loader does, then wraps what is watched in it."""

    def __init__(self, loader, points):
        self.loader, self.points = loader, points

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        watch_all(module, self.points)


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, points):
        self.points = points

    def find_spec(self, fullname, path=None, target=None):
        points = self.points.get(fullname)
        if not points:
            return None
        spec = None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)):
                spec.loader = Watching(spec.loader, points)
                break
        return spec


by_module = {}
for known in json.loads((HERE / "points.json").read_bytes()):
    by_module.setdefault(known.split(":")[0], []).append(known)
for loaded in [name for name in by_module if name in sys.modules]:  # os and the like
    watch_all(sys.modules[loaded], by_module.pop(loaded))
sys.meta_path.insert(0, Finder(by_module))
