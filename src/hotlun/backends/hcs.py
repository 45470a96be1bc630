"""The Windows Host Compute Service: its disks for a VM, and the mounts that it has guests make."""

from hotlun.backends.hcs_guest import HCSGuestBackend
from hotlun.backends.hcs_host import GRANT_PLAN, HCSHostBackend, revoke_after_the_end

__all__ = ["GRANT_PLAN", "HCSGuestBackend", "HCSHostBackend", "revoke_after_the_end"]
