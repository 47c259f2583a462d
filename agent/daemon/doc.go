// Package daemon is the agent of a host: it protects many VMs, each by an
// agent.Protector, answers on control sockets, and keeps on disk what it protects.
//
// # Life cycle
//
// New reads the state directory and takes its lock; Run takes up the VMs found there,
// serves until its context ends, and lets go of every VM. A VM's record is written
// before it is attached to and removed when somebody detaches it, so whatever instant
// the daemon is killed at, the next one takes up the same VMs. Nothing of the daemon is
// in a QEMU meanwhile: a checkpoint under way is given up by the child that takes it, or
// by that one's guardian.
//
// # Checkpoints
//
// Each is taken by a child of its own (package taker), so that no guardian ever watches
// the daemon: what goes wrong with one checkpoint is one checkpoint of one VM that failed.
//
// # Limits
//
// At most Limits.Checkpoints checkpoints are under way at a time, in the order in which
// they were wanted; a VM waits with one at a time, so between two turns of one VM every
// other that wanted one had its own. Bytes to the stores pass one bandwidth, in the
// order of their arrival. The memory that checkpoints buffer in is divided evenly
// between as many as may be under way.
//
// # Rights
//
// The control socket's group is as good as root: it can have any command run as root,
// by a hook or a policy. The read socket answers Status and Top alone.
//
// # Concurrency
//
// Daemon.mu guards the table of VMs and is held for no call that waits. Each VM has one
// goroutine, which owns its record; ward.mu guards what others read of it and is taken
// after Daemon.mu. Whoever replaces a VM's policy holds ward.setting, and whoever writes its
// record ward.keep, in this order and before ward.mu.
package daemon
