"""Hot-plugged disks for running VMs: attached, mounted, shared, and taken away again."""
