"""Programs that try to get out, to stay, to eat the machine, or to lie about how they ended.

The standard library alone: they run as another user, by another Python, too.
"""

from __future__ import annotations

from attacks.endings import ENDINGS
from attacks.escapes import ESCAPES
from attacks.files import FILES
from attacks.hoards import HOARDS
from attacks.limits import OVER_LIMITS

ATTACKS = [*OVER_LIMITS, *HOARDS, *FILES, *ESCAPES, *ENDINGS]

# Of each kind some, for boxes in which all of them would take minutes.
REPRESENTATIVE = (
    *("infinite_loop", "stop_every_process", "fork_bomb", "zombie_flood", "daemonize"),
    *("kill_parent", "mem_bomb_multi", "many_files", "write_root_and_devices", "read_secret"),
    *("memory_of_the_first_process", "slow_the_watch", "net_abstract_unix", "unshare_mount"),
    *("the_other_call_table", "output_flood", "huge_stdin_unread", "garbage_to_every_fd"),
    *("memory_out_of_sight", "first_threads_that_end", "unread_messages"),
)
