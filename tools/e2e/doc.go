// Package e2e tests ckagent as its users meet it: the release binary, run as a
// process of its own, against real QEMU machines.
//
// It has no code but tests. TestMain builds the binary once, with the flags of a
// release; each test gets a hard link to it, so that every process that test's
// ckagent leaves behind can be told from those of others by /proc/PID/exe.
//
// # Witnesses
//
// Nothing here asks ckagent whether it did well. Guests check their own memory
// and say so on their consoles; memory is compared with copies made through
// /proc/PID/mem while a proxy on the QMP socket withholds the command that would
// resume the guest; what is left in a QEMU process is read from its smaps, its
// page map and its descriptors.
//
// # How long it takes
//
// By default under five minutes, with -short the configurations and the long runs
// are left out. CKAGENT_E2E_LONG=1 runs the configurations that others cover, too.
// CKAGENT_E2E_ROUNDS=50 makes the run of consecutive checkpoints as
// long as it has to be before a release, CKAGENT_E2E_CHAIN=100 the chain that is
// merged and taken apart. CKAGENT_E2E_INCREMENTAL=512 and CKAGENT_E2E_DENSITY=1 measure
// what incremental checkpoints and several VMs in one store take (the latter beside
// restic). CKAGENT_E2E_PREDICTION=60s holds what replay says of policies against live runs
// so long each. CKAGENT_E2E_BINARY names a binary to test instead of building one.
//
// # Failure modes
//
// A test that fails leaves nothing running: machines, those that were restored
// included, are killed by pidfd, mounts and loop devices are taken away by
// cleanups. A test that is killed leaves restored machines behind (they are
// meant to outlive whoever asked for them), in cgroups named ckagent/restored-*.
package e2e
