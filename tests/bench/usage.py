"""What a process took. `python -S usage.py COMMAND…` runs it and writes [peak bytes, CPU seconds, exit code] last.

In between because Linux counts in a process's peak what its parent held when it forked, and a benchmark holds torch.
"""

import json
import os
import sys


def main() -> None:
    """Run the command with our own standard streams."""
    process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
    _, status, usage = os.wait4(process, 0)
    cpu_s = usage.ru_utime + usage.ru_stime
    print(json.dumps([usage.ru_maxrss * 1024, cpu_s, os.waitstatus_to_exitcode(status)]), file=sys.stderr)


if __name__ == "__main__":
    main()
