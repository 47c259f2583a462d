// Package restore brings a checkpointed VM back: it plans the command line
// (restore/plan), makes sure that the original is dead (restore/liveness), starts
// QEMU waiting for an incoming state, arms its memory, feeds the device state and
// lets the guest run while a pager (restore/pager) brings the memory in.
//
// # Life cycle of one restore
//
//	planned   image opened, command line rebuilt, nothing in the way,
//	          and the guest's disks made over the checkpoint's volumes (restore/overlay)
//	started   QEMU runs, in a session and cgroup of its own; meanwhile the pager's
//	          processes start and the stream is made
//	greeted   its monitor greets, while the machine is still being built; a
//	          userfaultfd is made inside
//	ready     its main loop answers
//	layout    every RAMBlock has its address
//	armed     small blocks are written, no page of the others is present, and
//	          whoever touches one waits for the pager
//	fed       the device state is loaded
//	running   the guest runs (or stays paused, as it was)
//	drained   all memory is in; nothing of ckagent is attached
//	flat      where asked for: the disks need the store no longer
//
// The control socket is bound here and inherited by QEMU, so that connecting to it
// works at once and waits for QEMU by itself. `cont` is sent together with
// migrate-incoming: QEMU takes it as the wish to run as soon as the state is
// loaded, which saves a round trip and the moment in between.
//
// # Failure
//
// Until the guest is told to run, any failure kills the new QEMU, ends its pager,
// removes its run directory and the disks made for it, and leaves everything else as
// it was. A QEMU that could
// not load the state is not asked again: it is told apart by what it wrote to its
// log. Once the guest was told to run it is never killed, unless QEMU failed before
// it could: an interrupt waits a moment for the outcome; where none shows, and where
// a drain cannot finish, the Result is returned together with the error, and the
// pager goes on. It also goes on, and drains, if we are killed in that moment.
//
// # Concurrency
//
// One Run is one goroutine plus an errgroup for what overlaps with QEMU's start,
// joined before it goes on. Runs of different VMs may overlap; of one VM they
// refuse each other (liveness.Hold). A restored QEMU and its pager are not children
// that have to be waited for: they outlive the caller.
package restore
