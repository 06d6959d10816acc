from __future__ import annotations

import subprocess
import sys


def test_torch_is_imported_without_looking_for_garbage_which_goes_on_afterwards():
    program = (
        "import gc, sys",
        "from worker.torch_import import import_torch",
        "passes = []",
        "gc.callbacks.append(lambda phase, info: passes.append(phase))",
        "import_torch()",
        "print('torch' in sys.modules, len(passes), gc.isenabled(), gc.get_freeze_count() > 100_000)",
        "gc.collect()",
        "print(len(passes))",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0", "True", "True", "2"]
