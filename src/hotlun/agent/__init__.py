"""The agent: runs inside the guest and does there what the host asks over the bridge.

Everything here, and everything it imports, is the standard library and
`hotlun.bridge`, for Python 3.9 and later: the agent is shipped as one file into
guests that have nothing else. It keeps no record of its own of what is mounted;
the kernel's is the only one, so that an agent that is started anew is as good
as the one before it.

A request's way: `links` (how the host is reached) -> `server` (what is asked, read by
`settings`) -> `lanes` (disks side by side, one disk in order) -> `disks` (what is done),
which finds the disk, puts layers over it, sees to a filesystem, and mounts:

* `scsi`: the device, proved to be the one that is meant (`vpd`), claimed, let go; with
  `controllers`, `partitions`, `claims`, `orders`, `writeback`, and `holders` (who is in
  the way);
* `mappings`: what lies over it (`devmapper`): `encryption` (with `keyring`, `unwritten`),
  `luks`, `verity`;
* `filesystems`: what is on it (`blkid`, `superblocks`), and making one (`programs`,
  `orphans`);
* `mounts`: where it is to be seen (`places`), and how (`mounting`, `options`, `mountinfo`,
  `syscalls`).
"""
